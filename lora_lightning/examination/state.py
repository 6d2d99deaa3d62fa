"""All of a run that has to be equal, as plain values by name, and where two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.modules_to_save import OriginalTensors
from lora_lightning.checkpoint.fingerprint import persistent_buffers
from lora_lightning.errors import first_few
from lora_lightning.examination.recipe import Run
from lora_lightning.utilities.rng import random_state

Values = dict[str, Any]


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and persistent buffers, whatever the module's state dict leaves."""
    return {name: tensor.detach().cpu().clone() for name, tensor in own_tensors(module).items()}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers themselves.

    What the base has in modules that train in full is in its place while adapters are disabled.
    """
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    aside: list[str] = []
    for path, child in module.named_modules(remove_duplicate=False):
        found |= {f"{path}.{n}" if path else n: buffer for n, buffer in persistent_buffers(child)}
        if isinstance(child, OriginalTensors):
            aside.append(path + ".")
    return {name: tensor for name, tensor in found.items() if not name.startswith(tuple(aside))}


def put_back(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the `values` that `tensors` copied."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    with torch.inference_mode():  # where buffers may have been made anew
        for name, value in values.items():
            if own[name].shape == value.shape:
                own[name].copy_(value)


def of_run(run: Run) -> Values:
    """Module, optimizers, schedulers, random numbers, metrics and counters after a fit."""
    trainer: Any = run.trainer
    # nn.Module's, past what the LightningModule itself may leave out; with the states of metrics
    # and of `get_extra_state`.
    beside = {k: v for k, v in nn.Module.state_dict(run.module).items() if v is not None}
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    values = {
        **_flat(beside, ""),
        **tensors(run.module),
        **_flat(dict(enumerate(optimizers)), "optimizer "),
        **_flat(dict(enumerate(schedulers)), "scheduler "),
        **_flat(dict(trainer.callback_metrics), "metric "),
        "random numbers": random_state(),
        "global_step": trainer.global_step,
    }
    return {name: _copied(value) for name, value in values.items()}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same, bit for bit, or only in one of both."""
    nothing = object()
    return [
        name
        for name in {**first, **second}
        if not same(first.get(name, nothing), second.get(name, nothing))
    ]


def same(first: Any, second: Any) -> bool:
    """True for values that are equal bit for bit; NaN equals NaN."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        one, two = first.detach().cpu(), second.detach().cpu()
        return bool(((one == two) | ((one != one) & (two != two))).all())
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        pairs = zip(first, second, strict=False)
        return len(first) == len(second) and all(same(a, b) for a, b in pairs)
    return bool(first == second) or bool(first != first and second != second)


def described(names: list[str], one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """The first few of differing names, and by how much they differ."""
    return first_few((_by_how_much(name, one.get(name), two.get(name)) for name in names), 3)


def _by_how_much(name: str, one: Any, two: Any) -> str:
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape:
        gap = (one.double() - two.double()).abs().max() if one.numel() else torch.tensor(0.0)
        return f"{name} (by up to {float(gap):.2g})"
    if isinstance(one, (int, float)) and isinstance(two, (int, float)):
        return f"{name} ({one:.6g} and {two:.6g})"
    missing = one is None or two is None
    return f"{name} (only in one of both)" if missing else name


def _flat(values: Mapping[Any, Any], prefix: str) -> Values:
    flat: Values = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, list):
        return [_copied(part) for part in value]
    return value
