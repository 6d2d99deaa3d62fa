"""`WeightAveraging` averages what trains, and what else moves.

It averages every tensor. Of a frozen one that is d w + (1 - d) w, which differs from w by rounding:
the base would drift away from what the adapters were trained on, and the codes of a quantised base
(whole numbers, cut off) would become others.
"""

from __future__ import annotations

from types import MethodType

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lora_lightning.checkpoint.fingerprint import base_tensors
from lora_lightning.training._lightning import all_callbacks, averaged_model
from lora_lightning.utilities.wrappers import plain_name


def averaged_models(trainer: Trainer) -> list[nn.Module]:
    """The copies of the module that WeightAveraging callbacks keep during fit."""
    models = map(averaged_model, all_callbacks(trainer))
    return [model for model in models if model is not None]


def average_what_trains(trainer: Trainer) -> None:
    """Override `update_parameters` on the averaged copies; doing it again changes nothing."""
    for averaged in averaged_models(trainer):
        if isinstance(averaged, AveragedModel):
            averaged.update_parameters = MethodType(_update_parameters, averaged)  # type: ignore[method-assign]


class _Part(nn.Module):
    """Some tensors of a module, for `AveragedModel` to look at in its place."""

    def __init__(self, parameters: list[nn.Parameter], buffers: list[Tensor]) -> None:
        super().__init__()
        for index, parameter in enumerate(parameters):
            self.register_parameter(f"p{index}", parameter)
        for index, buffer in enumerate(buffers):
            self.register_buffer(f"b{index}", buffer)


def _update_parameters(self: AveragedModel, model: nn.Module) -> None:
    whole = self.module
    averages = dict(whole.named_parameters())
    own = dict(model.named_parameters())
    dense = {name for name, _ in base_tensors(model, quantized=False)}
    moving = [n for n, p in own.items() if not p.requires_grad and plain_name(n) in dense]
    # The module may move parameters of its base by its own hand (a teacher).
    differ = _differ([(averages[name], own[name]) for name in moving])
    moved = {name for name, differs in zip(moving, differ, strict=True) if differs}
    trained = {n: p for n, p in own.items() if p.requires_grad or n in moved}
    pairs = list(zip(whole.buffers(), model.buffers(), strict=True))
    buffers = [pair for pair, differs in zip(pairs, _differ(pairs), strict=True) if differs]
    self.module = _Part([averages[name] for name in trained], [mine for mine, _ in buffers])
    try:
        type(self).update_parameters(
            self, _Part(list(trained.values()), [theirs for _, theirs in buffers])
        )
    finally:
        self.module = whole


def _differ(pairs: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """Compare each pair; the device is waited for once, as each adapter has buffers."""
    if not pairs:
        return []
    device = pairs[0][0].device
    found = [(one != other.to(one.device)).any().to(device) for one, other in pairs]
    flags: list[bool] = torch.stack(found).tolist()
    return flags
