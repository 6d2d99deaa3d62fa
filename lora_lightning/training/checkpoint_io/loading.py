"""A LightningModule out of a checkpoint that holds its adapters only."""

from __future__ import annotations

import io
import os
import re
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from lora_lightning.checkpoint.loading import load_adapter
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import KEY, OPTIONS, TASK
from lora_lightning.engine.injection import delete_adapter
from lora_lightning.engine.switching import adapter_names, set_adapter
from lora_lightning.errors import CheckpointError

Module = TypeVar("Module", bound=nn.Module)


def load_from_checkpoint(
    module_class: type[Module], checkpoint_path: str | os.PathLike[str], **kwargs: Any
) -> Module:
    """`module_class.load_from_checkpoint` for a checkpoint that a run with `LoraCallback` wrote.

    The module is made from the checkpoint's hyperparameters; it brings its own base, which has to
    be the one that the adapters were trained on. Then they are put on and act. No
    LoraCallback and no Trainer is needed. The tasks of this library keep their own options, and the
    precision of their base, in every checkpoint: with the same model at hand, the file is enough.

    Args:
        module_class: The LightningModule's class, unchanged.
        checkpoint_path: The file.
        **kwargs: What `LightningModule.load_from_checkpoint` takes: hyperparameters that are to
            differ from the saved ones, or that were not saved; `weights_only=False` for a file
            that you trust, whose hyperparameters or states hold objects of classes;
            `map_location`: a device that the module is moved to, by default the CPU. `strict` has
            no say: the base is in no file, and adapters are always complete.

    Returns:
        The module, in train mode, its adapters active.

    Raises:
        CheckpointError: If the file is damaged or of another kind, or another task wrote it.
        AdapterMismatchError: If adapters or base do not fit.

    """
    weights_only = kwargs.get("weights_only") is not False  # default: as torch has it
    device = _device(kwargs.pop("map_location", None))
    kwargs.pop("strict", None)
    checkpoint = read_adapter_checkpoint(checkpoint_path, weights_only)
    _check_task(checkpoint.get(TASK), module_class, checkpoint_path)
    state = checkpoint["state_dict"]
    came_along = _with_the_adapters(checkpoint)
    checkpoint["state_dict"] = {key: state[key] for key in state if key not in came_along}
    options = checkpoint.get(OPTIONS, {})
    if not isinstance(options, dict):
        raise CheckpointError(
            f"{str(checkpoint_path)!r} is damaged: its entry {OPTIONS!r} does not say how the "
            "module is made."
        )
    if options:
        checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), **options}
    rest = io.BytesIO()
    torch.save(checkpoint, rest)
    rest.seek(0)
    with warnings.catch_warnings():
        # The base is no part of the file, and what moved comes with the adapters.
        warnings.filterwarnings("ignore", message="Found keys that are (in|not in) the model state")
        warnings.filterwarnings("ignore", message="The state dict in .* contains no parameters")
        module: Module = module_class.load_from_checkpoint(  # type: ignore[attr-defined]
            rest, map_location="cpu", strict=False, **kwargs
        )
    for name in checkpoint[KEY]["adapters"]:
        if name in adapter_names(module):  # they came with a network that is a hyperparameter
            delete_adapter(module, name)
    set_adapter(module, load_adapter(module, checkpoint_path, weights_only=weights_only))
    return module if device is None else module.to(device)


def _check_task(task: object, module_class: type, path: str | os.PathLike[str]) -> None:
    if isinstance(task, str) and task not in {kind.__name__ for kind in module_class.__mro__}:
        raise CheckpointError(
            f"{str(path)!r} is the checkpoint of a {task}, not of a {module_class.__name__}: "
            f"load_from_checkpoint({task}, ...)."
        )


def _device(map_location: Any) -> torch.device | None:
    if map_location is None:
        return None
    if not isinstance(map_location, (str, int, torch.device)):
        raise CheckpointError(
            f"map_location is a {type(map_location).__name__}; name the device that the module is "
            "to be on, such as 'cpu' or 'cuda:0'. (map_location)"
        )
    return torch.device(map_location)


def _with_the_adapters(checkpoint: dict[str, Any]) -> set[str]:
    """Tensors that come with the adapters; a `load_state_dict` may ask for its other entries."""
    found: set[str] = {*checkpoint[KEY]["base"]}
    for entry in checkpoint[KEY]["adapters"].values():
        found |= {*entry["tensors"]}
    # What trains in full, or follows it, has a base that no fingerprint holds.
    in_full = re.compile(r"(.+)\.adapters\.[^.]+\.module\.(.+)").fullmatch
    matches = map(in_full, checkpoint["state_dict"])
    return found | {".".join(match.groups()) for match in matches if match}
