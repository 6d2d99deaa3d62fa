"""Frozen norm layers keep their running statistics: they stay in eval mode while adapters are on.

`model.train()` reaches every module through its `train` method, so that is what is held: on the
instance, and only on norm layers that track statistics. Trial runs of Lightning's Tuner, which
leave callbacks out, respect it too.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lora_lightning.adapters.modules_to_save import base_tensors_of
from lora_lightning.layers.traversal import walk


def train(self: nn.Module, mode: bool = True) -> nn.Module:
    """`Module.train` of a norm layer that is held: eval mode, unless its statistics train."""
    for child in self.children():
        child.train(mode)
    base = base_tensors_of(self)
    trains = any(buffer is not base._buffers[name] for name, buffer in self._buffers.items())
    self.training = mode and trains
    return self


def freeze_norm_stats(model: nn.Module) -> None:
    """Put every frozen norm layer with running statistics into eval mode for good."""
    for _, module in walk(model):
        if isinstance(module, _NormBase) and module.track_running_stats and not _trains(module):
            # No bound method: pickle looks that up by name, and finds the class's own.
            mode = module.training
            module.train = partial(train, module)  # type: ignore[method-assign, assignment]
            module.train(mode)


def unfreeze_norm_stats(model: nn.Module) -> None:
    """Undo `freeze_norm_stats`; the layers take on the mode of `model`."""
    for _, module in walk(model):
        if is_held(module):
            del module.__dict__["train"]
            module.training = model.training


def is_held(module: nn.Module) -> bool:
    """Tell whether `freeze_norm_stats` keeps this very module in eval mode."""
    return getattr(module.__dict__.get("train"), "func", None) is train


def _trains(module: nn.Module) -> bool:
    return any(
        parameter.requires_grad for parameter in base_tensors_of(module).parameters(recurse=False)
    )
