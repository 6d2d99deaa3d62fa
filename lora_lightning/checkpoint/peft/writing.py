"""Adapters into PEFT folders: adapter_config.json beside adapter_model.safetensors.

Source: the files that peft 0.21.2 writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from lora_lightning.checkpoint.peft import keys
from lora_lightning.checkpoint.peft.base_model import (
    folder_target,
    grown_tables,
    head_names,
    is_pretrained,
    plain_class,
    pretrained_inside,
)
from lora_lightning.checkpoint.peft.config import (
    CONFIG,
    MADE_FOR,
    MIX,
    OWN,
    TENSORS,
    TOKENS,
    TWICE_UP_TO,
    is_folder_name,
)
from lora_lightning.checkpoint.peft.description import Description, describe
from lora_lightning.engine.switching import check_known
from lora_lightning.errors import AdapterStateError, CheckpointError, first_few
from lora_lightning.utilities.atomic_write import write_atomically
from lora_lightning.utilities.dtensor import is_sharded
from lora_lightning.utilities.is_a import is_a
from lora_lightning.utilities.notice import say_once


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | Sequence[str] = "default",
) -> None:
    """Write an adapter as a PEFT folder: adapter_config.json and adapter_model.safetensors.

    The same adapter gives the same bytes, in any process. An adapter whose start was subtracted
    from it (PiSSA, OLoRA) is written as the plain LoRA of twice the rank that it is. PEFT adds the
    update of an attention's out_proj twice, so that its B is written as half of what it is.

    The folder of a LightningModule whose adapter lies in one pretrained model inside is for that
    model, as if it had been given; the names are its own, and so is `base_model_name_or_path`.
    What PEFT would compute otherwise gets a type that PEFT refuses, and is said.

    Args:
        model: The model that PEFT would load the adapter onto, or a LightningModule around it.
        directory: Made if need be; files of these names in it are replaced.
        adapter_name: Which adapter; several names give a folder with one folder for each, which
            `load_adapter` reads back in this order.

    Raises:
        AdapterStateError: If there is no such adapter, or it is on the meta device.
        CheckpointError: If the folder cannot be written; what was there before is still there.

    """
    folder = Path(directory)
    if isinstance(adapter_name, str):
        files = adapter_files(model, folder, adapter_name)
    else:
        names = list(dict.fromkeys(adapter_name))
        if not names or not all(map(is_folder_name, names)):
            raise AdapterStateError(
                f"The adapters {names} cannot be saved in a folder of folders: it takes at least "
                "one, and names that can be those of folders. Save each in a folder of your own."
            )
        files = {}
        for name in names:
            files.update(adapter_files(model, folder / name, name))
        files[folder / CONFIG] = as_json({"peft_type": MIX, "adapters": names})
    try:
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(files)
    except OSError as error:
        raise CheckpointError(
            f"The adapter cannot be written to {str(folder)!r}: {error.strerror or error}."
        ) from error


def adapter_files(model: nn.Module, folder: Path, adapter_name: str) -> dict[Path, bytes]:
    """The files of `save_adapter`, by their paths; the errors are its own."""
    check_known(model, adapter_name)
    given, (model, prefix) = model, folder_target(model, adapter_name)
    description = describe(model, adapter_name)
    config = description.options
    _say_who_can_load(given, model, adapter_name, description)
    own = keys.tensors_to_save(model, adapter_name)
    if config["peft_type"] == TOKENS:
        own = keys.rows_alone(model, adapter_name)
    if not config["peft_type"].startswith(OWN):
        saved = config.get("modules_to_save") or []
        copied = keys.also_saved_by_peft(model, saved, head_names(config["task_type"]))
        own = {**keys.tensors_of_base(model, copied), **own}  # of which biases may train
        if doubled := [key for key in own if key.endswith(keys.OUT_PROJ_B)]:
            config["peft_version"] = TWICE_UP_TO
            for key in doubled:
                # Halved without rounding: float16 has too few bits for small numbers.
                own[key] = (own[key].float() if own[key].dtype == torch.float16 else own[key]) / 2
    if grown := grown_tables(model):
        say_once(
            f"The vocabulary is larger than that of {config['base_model_name_or_path']!r}: the "
            f"folder of adapter {adapter_name!r} comes with {first_few(grown)} of this base, whose "
            "added rows are in no other file."
        )
        own = {**keys.tables_of_base(model, adapter_name, grown), **own}
    tensors = {}
    for key, tensor in sorted(own.items()):
        if tensor.is_meta:
            raise AdapterStateError(
                f"Adapter {adapter_name!r} is on the meta device and has no values to save: load "
                "it first."
            )
        if is_sharded(tensor):
            raise AdapterStateError(
                f"Adapter {adapter_name!r} is spread over several processes. Load it in one "
                "process, load_adapter(model, 'last.ckpt'), and save it from there."
            )
        tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
    content = to_safetensors(tensors, metadata={"format": "pt"})
    if prefix:
        content = _with_metadata(content, {MADE_FOR: prefix.rstrip(".")})
    return {folder / TENSORS: content, folder / CONFIG: as_json(config)}


def _say_who_can_load(
    given: nn.Module, model: nn.Module, adapter_name: str, description: Description
) -> None:
    """Say it where that is less than all who know PEFT's folders and the base's name."""
    kind = plain_class(model).__name__
    if description.obstacles:
        say_once(
            f"Adapter {adapter_name!r} is saved as a {description.options['peft_type']}, which "
            f"load_adapter reads and PEFT refuses: {'; '.join(description.obstacles)}. For a "
            "folder that PEFT loads, train without that (exclude_modules leaves modules out); or "
            "hand the model on with the adapter merged into it (merge_and_unload)."
        )
    inside = [target.prefix[:-1] for target in pretrained_inside(model)]
    if inside and not is_a(model, "LightningModule") and not is_pretrained(model):
        say_once(
            f"The folder of adapter {adapter_name!r} is for a {kind} and has its names: in the "
            f"model inside ({', '.join(inside)}) PEFT would find none of its modules, and only "
            f"warn. For a folder of that: save_adapter(module.{inside[0]}, folder)."
        )
    elif given is model and is_a(model, "LightningModule"):
        reason = (
            f"the adapter is not inside one of the pretrained models in it ({', '.join(inside)})"
            if inside
            else "it holds no pretrained model of Hugging Face, whose names others have"
        )
        say_once(
            f"The folder of adapter {adapter_name!r} is for a {kind} and has its names: {reason}. "
            f"It is loaded by load_adapter({kind}(...), folder); in another model PEFT would find "
            "none of its modules, and only warn."
        )


def _with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with more metadata, which safetensors itself writes in a random order."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] |= metadata
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)  # the tensors are aligned
    return len(written).to_bytes(8, "little") + written + content[start:]


def as_json(content: dict[str, Any]) -> bytes:
    """An adapter_config.json; the same options give the same bytes."""
    ordered = {key: content[key] for key in sorted(content)}  # inside, patterns have an order
    return (json.dumps(ordered, indent=2) + "\n").encode()
