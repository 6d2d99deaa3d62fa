"""The checkpoint file that a run with `LoraCallback` writes: read, and checked for being whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.checkpoint.integrity import damaged_parts, why_unreadable
from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder, read_checkpoint_folder
from lora_lightning.checkpoint.state_dict import FORMAT, KEY
from lora_lightning.errors import CheckpointError, first_few


def read_adapter_checkpoint(
    path: str | os.PathLike[str], weights_only: bool = True
) -> dict[str, Any]:
    """The content of an adapter-only Lightning checkpoint; a damaged or other file is refused.

    `weights_only`: as of `torch.load`.
    """
    file = Path(path)
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise CheckpointError(
            f"{str(file)!r} is no ordinary file but a device, a pipe or the like, which may never "
            "end. Write what it gives into a file, and name that."
        )
    try:
        if is_checkpoint_folder(file):
            checkpoint = read_checkpoint_folder(file, weights_only)
        else:
            checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # damaged files raise almost anything
        raise CheckpointError(
            f"{str(file)!r} cannot be read as a checkpoint: {why_unreadable(error)}."
        ) from None
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise CheckpointError(
            f"{str(file)!r} is no adapter checkpoint: it was not written by a run with "
            "LoraCallback (one that trained all of the module is loaded by the module's own "
            "load_from_checkpoint, with its arguments). A PEFT adapter is loaded from its folder."
        )
    metadata = checkpoint[KEY]
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise CheckpointError(
            f"{str(file)!r} has format {found}, written by a newer lora_lightning; this one reads "
            f"up to format {FORMAT}. Update lora_lightning."
        )
    if not (isinstance(found, int) and _is_whole(metadata, checkpoint.get("state_dict"))):
        raise CheckpointError(
            f"{str(file)!r} is damaged: its entry {KEY!r} does not say what the file holds."
        )
    parts = damaged_parts(checkpoint)
    if parts:
        raise CheckpointError(
            f"{str(file)!r} is damaged: {first_few(parts, 3)} is not what was written."
        )
    return checkpoint


def _is_whole(metadata: dict[str, Any], state: Any) -> bool:
    adapters, base = metadata.get("adapters", {}), metadata.get("base", {})
    for part in (adapters, base, state):
        if not (isinstance(part, dict) and part and all(isinstance(key, str) for key in part)):
            return False
    if not all(isinstance(entry, list) and len(entry) == 3 for entry in base.values()):
        return False
    for entry in adapters.values():
        types = {"config": dict, "module": str, "tensors": dict}
        if not isinstance(entry, dict) or not isinstance(entry.get("peft_type", ""), str):
            return False
        if not all(isinstance(entry.get(key), kind) for key, kind in types.items()):
            return False
        if not entry["tensors"] or not all(isinstance(key, str) for key in entry["config"]):
            return False
        if not all(isinstance(state.get(key), Tensor) for key in entry["tensors"]):
            return False
        inside = f"{entry['module']}." if entry["module"] else ""
        if not all(key.startswith(inside) for key in entry["tensors"]):
            return False
    return True
