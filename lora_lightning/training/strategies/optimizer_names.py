"""Optimizer state by the names of the parameters.

torch numbers parameters in the order in which an optimizer holds them, and Lightning's strategies
do so in orders of their own, so that moments could end up at other tensors. In our checkpoints the
state of a parameter stands under its name in the LightningModule, whatever wrote it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.errors import CheckpointError, OptimizerError, first_few
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.utilities.dtensor import distribute_like, is_sharded

_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def with_names(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """`optimizer.state_dict()` by names; OptimizerError if it holds what is not the module's."""
    names = _names(optimizer, module)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    name_of = dict(zip(numbers, [name for group in names for name in group], strict=True))
    return {
        **state,
        "state": {name_of.get(number, number): own for number, own in state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def with_numbers(saved: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """A state for `optimizer.load_state_dict`, from one that `with_names` gave.

    The order in a group may be another one. Moments of sharded parameters are sharded alike. A
    state with numbers, of a checkpoint from before there were names, is returned as it is.
    CheckpointError if the groups hold other parameters than the optimizer's, OptimizerError if a
    state cannot be split as its parameter is.
    """
    groups = saved["param_groups"]
    if not any(isinstance(name, str) for group in groups for name in group["params"]):
        return saved
    names = _names(optimizer, module)
    _check_kind(groups, optimizer)
    _check_groups([group["params"] for group in groups], names)
    order = [name for group in names for name in group]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    number_of = {name: number for number, name in enumerate(order)}
    state = {
        number_of.get(name, name): {
            key: _laid_out(value, params[number_of[name]], f"{name!r} ({key})")
            for key, value in own.items()
        }
        if name in number_of
        else own
        for name, own in saved.get("state", {}).items()
    }
    own_groups = [
        {**group, "params": [number_of[name] for name in own]}
        for group, own in zip(groups, names, strict=True)
    ]
    return {**saved, "state": state, "param_groups": own_groups}


def _names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    name_of = {id(p): name for name, p in named_parameters(module)}
    groups = [group["params"] for group in optimizer.param_groups]
    if any(id(p) not in name_of for group in groups for p in group):
        raise OptimizerError(
            f"{type(optimizer).__name__} holds a tensor that is no parameter of the module: its "
            "state could not be found again in a checkpoint. Was a parameter replaced after "
            "configure_optimizers?"
        )
    return [[name_of[id(p)] for p in group] for group in groups]


def _check_kind(saved: list[dict[str, Any]], optimizer: Optimizer) -> None:
    """Compare kinds of optimizers by their options; schedulers and torch may have added some."""
    kind = type(getattr(optimizer, "inner", optimizer)).__name__  # of what DeepSpeed wraps
    for there, here in zip(saved, optimizer.param_groups, strict=False):
        foreign = sorted(there.keys() - here.keys() - _OF_SCHEDULERS)
        missing = sorted(optimizer.defaults.keys() - there.keys())
        if foreign and missing:
            raise CheckpointError(
                f"The checkpoint's optimizer is of another kind than this run's "
                f"{kind}: it has {', '.join(foreign)}, and no "
                f"{', '.join(missing)}. Use the one that the checkpoint was trained with; to go on "
                "with another, start a new run from its adapters, LoraCallback(init_from=...) "
                "without ckpt_path. (ckpt_path)"
            )


def _check_groups(saved: list[list[str]], own: list[list[str]]) -> None:
    lines = []
    if len(saved) != len(own):
        lines.append(f"{len(saved)} groups in the checkpoint, {len(own)} here")
    for index, (there, here) in enumerate(zip(saved, own, strict=False)):
        if missing := sorted(set(here) - set(there)):
            lines.append(f"group {index}, not in the checkpoint's: {first_few(missing)}")
        if extra := sorted(set(there) - set(here)):
            lines.append(f"group {index}, only in the checkpoint's: {first_few(extra)}")
    if lines:
        raise CheckpointError(
            "The checkpoint's optimizer has other parameter groups than this run's:\n  "
            + "\n  ".join(lines)
            + "\nUse the configure_optimizers that the checkpoint was trained with. (ckpt_path)"
        )


def _laid_out(value: Any, parameter: nn.Parameter, what: str) -> Any:
    if not (isinstance(value, Tensor) and is_sharded(parameter)) or value.dim() == 0:
        return value
    if value.shape != parameter.shape:
        raise OptimizerError(
            f"The optimizer's state of {what} has shape {tuple(value.shape)}, its parameter "
            f"{tuple(parameter.shape)}: it cannot be split over processes as the parameter is. "
            "Resume on one device or under DDP, or use an optimizer whose state has the "
            "parameters' shape (AdamW). (ckpt_path)"
        )
    return distribute_like(value, parameter)
