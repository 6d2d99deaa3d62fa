"""Adapters out of the checkpoints that a run with `LoraCallback` writes, without a Trainer."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import config_type_of
from lora_lightning.checkpoint import KEY, load_adapter_state_dict
from lora_lightning.errors import AdapterMismatchError, AdapterStateError, CheckpointError
from lora_lightning.fingerprint import base_fingerprint, fingerprint_difference
from lora_lightning.hosts.base import walk
from lora_lightning.injection import inject_adapter


def load_from_checkpoint(model: nn.Module, file: Path, adapter_name: str | None) -> list[str]:
    """Put the adapters of a Lightning checkpoint on `model`, the LightningModule or its inside.

    Args:
        model: The module that was trained, or a part of it that holds all that was adapted.
        file: A checkpoint that a run with `LoraCallback` wrote.
        adapter_name: Another name for the checkpoint's only adapter, or the name of one of several.

    Raises:
        CheckpointError: If the file is damaged or of another kind.
        AdapterMismatchError: If adapters or base differ.

    """
    checkpoint = read_checkpoint(file)
    manifest = checkpoint[KEY]
    entries: dict[str, Any] = manifest["adapters"]
    if adapter_name is None:
        wanted = {name: name for name in entries}
    elif adapter_name in entries:
        wanted = {adapter_name: adapter_name}
    elif len(entries) == 1:
        wanted = {next(iter(entries)): adapter_name}
    else:
        raise AdapterStateError(
            f"{str(file)!r} holds the adapters {sorted(entries)}, but no {adapter_name!r}."
        )
    for saved_name, name in wanted.items():
        _load_one(model, file, entries[saved_name], saved_name, name, checkpoint["state_dict"])
    prefix = _prefix(model, list(manifest["base"]))
    saved = {k.removeprefix(prefix): v for k, v in manifest["base"].items() if k.startswith(prefix)}
    found = base_fingerprint(model)
    shared = saved.keys() & found.keys()
    lines = fingerprint_difference({k: saved[k] for k in shared}, {k: found[k] for k in shared})
    if lines:
        raise AdapterMismatchError(
            f"The adapters of {str(file)!r} were trained on another base model; nothing was "
            f"loaded. {len(lines)} of {len(saved)} base tensors differ:\n  "
            + "\n  ".join(lines[:4])
        )
    return list(wanted.values())


def _load_one(
    model: nn.Module,
    file: Path,
    entry: dict[str, Any],
    saved_name: str,
    name: str,
    tensors: dict[str, Tensor],
) -> None:
    keys = list(entry["tensors"])
    prefix = _prefix(model, keys)
    root_path = entry["module"]
    inner = f"{root_path}."[len(prefix) :] if root_path else ""
    root = model.get_submodule(inner.removesuffix(".")) if inner else model
    config = config_type_of(entry.get("peft_type", "LORA")).from_dict(entry["config"])
    inject_adapter(root, config, name, low_cpu_mem_usage=not config.starts_from_base)
    marker = f"adapters.{saved_name}."
    state = {}
    for key in keys:
        if key not in tensors:
            raise CheckpointError(f"{str(file)!r} is damaged: it lacks {key!r}.")
        short = key.removeprefix(prefix).removeprefix(inner).replace(marker, "", 1)
        copy_of = f"{marker}module."
        if copy_of in key:
            short = key.removeprefix(prefix).removeprefix(inner).replace(copy_of, "", 1)
        state[short] = tensors[key]
    load_adapter_state_dict(root, state, name)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of an adapter-only Lightning checkpoint.

    Raises:
        CheckpointError: If the file is damaged or of another kind.

    """
    file = Path(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be read as a checkpoint: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise CheckpointError(
            f"{str(file)!r} is no adapter checkpoint: it was not written by a run with "
            "LoraCallback. A PEFT adapter is loaded from its folder."
        )
    return checkpoint


def _prefix(model: nn.Module, keys: list[str]) -> str:
    """What to take off the front of `keys` so that they name tensors below modules of `model`."""
    paths = {path for path, _ in walk(model)}
    parts = keys[0].split(".")
    for skipped in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:skipped])
        inside = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        first = {key.split(".")[0] for key in inside}
        if len(inside) == len(keys) and all(name in paths for name in first):
            return prefix
    raise AdapterMismatchError(
        f"The checkpoint's tensors ({keys[0]}, ...) belong to no module of this "
        f"{type(model).__name__}: give the model that was trained."
    )
