"""PEFT folders, both ways: adapter_config.json beside adapter_model.safetensors.

Source: the files that peft 0.21.2 writes and reads. A folder is untrusted input: everything is
checked before the model is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lora_lightning.checkpoint.compatibility import check_values, tensor_differences
from lora_lightning.checkpoint.loading import load_adapters
from lora_lightning.checkpoint.peft.config import (
    OWN,
    TOKENS,
    adds_twice,
    describe,
    for_twice,
    parse,
)
from lora_lightning.checkpoint.peft.file_content import FileContent, content_of_file
from lora_lightning.checkpoint.peft.keys import (
    OUT_PROJ_B,
    also_saved_by_peft,
    rows_alone,
    tensors_of_base,
    tensors_to_load,
    tensors_to_save,
)
from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder
from lora_lightning.checkpoint.state_dict import materialize
from lora_lightning.engine.construction import BuildContext
from lora_lightning.engine.injection import delete_adapter, extend_adapter, unchanged_on_error
from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import (
    AdapterMismatchError,
    AdapterStateError,
    CheckpointError,
    LoraError,
    first_few,
    nearest_hint,
)
from lora_lightning.utilities.atomic_write import write_atomically
from lora_lightning.utilities.dtensor import is_sharded
from lora_lightning.utilities.wrappers import plain_name

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MIX = OWN + "MIX"  # the peft_type of a folder of folders
LARGEST_CONFIG = 10_000_000  # bytes


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | Sequence[str] = "default",
) -> None:
    """Write an adapter as a PEFT folder: adapter_config.json and adapter_model.safetensors.

    The same adapter gives the same bytes, in any process. An adapter whose start was subtracted
    from it (PiSSA, OLoRA) is written as the plain LoRA of twice the rank that it is. PEFT adds the
    update of an attention's out_proj twice, so that its B is written as half of what it is.

    Args:
        model: The model that PEFT would load the adapter onto.
        directory: Made if need be; files of these names in it are replaced.
        adapter_name: Which adapter; several names give a folder with one folder for each, which
            `load_adapter` reads back in this order.

    Raises:
        AdapterStateError: If there is no such adapter, or it is on the meta device.
        CheckpointError: If the folder cannot be written; what was there before is still there.

    """
    folder = Path(directory)
    if isinstance(adapter_name, str):
        files = _files(model, folder, adapter_name)
    else:
        names = list(dict.fromkeys(adapter_name))
        if not names or not all(map(_is_folder_name, names)):
            raise AdapterStateError(
                f"The adapters {names} cannot be saved in a folder of folders: it takes at least "
                "one, and names that can be those of folders. Save each in a folder of your own."
            )
        files = {}
        for name in names:
            files.update(_files(model, folder / name, name))
        files[folder / CONFIG] = _json({"peft_type": MIX, "adapters": names})
    try:
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(files)
    except OSError as error:
        raise CheckpointError(
            f"The adapter cannot be written to {str(folder)!r}: {error.strerror or error}."
        ) from error


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    autocast_adapter_dtype: bool = True,
) -> list[str]:
    """Put an adapter on `model` from a PEFT folder or an adapter-only Lightning checkpoint.

    As with `inject_adapter`, the first adapter on a model is active and trainable, later ones are
    neither. Nothing is fetched from a hub. Everything is checked first: on any error the model is
    as it was before.

    Args:
        model: The model that the adapter was made for.
        path: The folder, or a checkpoint that a run with `LoraCallback` wrote.
        adapter_name: The name to give it. Default: "default" for a PEFT folder; the names they
            have for the adapters of a checkpoint or a folder of several.
        autocast_adapter_dtype: As of `inject_adapter`; False rounds the file's values to the
            dtype of a 16-bit base.

    Returns:
        The names of the adapters that were loaded.

    Raises:
        CheckpointError: If the files are missing, damaged or of another kind.
        AdapterMismatchError: If the adapter does not fit the model, or uses what this library does
            not have.
        AdapterStateError: If the model already has an adapter of that name.

    """
    place = Path(path)
    whole_file = place.is_file() and place.name not in (CONFIG, TENSORS)
    if whole_file or is_checkpoint_folder(place):
        if place.suffix == ".safetensors":
            raise CheckpointError(
                f"{str(place)!r} holds tensors, but does not say how they act: a PEFT adapter is "
                f"loaded from a folder that holds them as {TENSORS} beside {CONFIG}."
            )
        with unchanged_on_error(model):
            return load_adapters(model, place, adapter_name, autocast_adapter_dtype)
    folder = place.parent if place.is_file() else place
    options = _read_config(folder)
    if options.get("peft_type") == MIX:
        names = _names_in_mix(folder, options, adapter_name)
        folders = {name: folder / name for name in names}
    else:
        folders = {"default" if adapter_name is None else adapter_name: folder}
    with unchanged_on_error(model):
        for name, own in folders.items():
            _load_folder(model, own, name, autocast_adapter_dtype)
    return list(folders)


def _names_in_mix(folder: Path, options: dict[str, Any], adapter_name: str | None) -> list[str]:
    """The adapters of a folder of folders.

    Raises:
        CheckpointError: If it does not list them, or as what cannot be folders in it.
        AdapterStateError: If another name was asked for.

    """
    names = options.get("adapters")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{str(folder / CONFIG)!r} does not list the adapters of its folder.")
    if adapter_name is not None:
        raise AdapterStateError(
            f"{str(folder)!r} holds the adapters {names}, which keep their names; load one of "
            f"them from its own folder to give it the name {adapter_name!r}."
        )
    if not names or not all(map(_is_folder_name, names)):
        raise CheckpointError(
            f"{str(folder / CONFIG)!r} names {names} as its adapters, not folders beside it."
        )
    return names


@contextmanager
def opened_folder(
    model: nn.Module, folder: Path
) -> Iterator[tuple[FileContent, dict[str, list[int]], Any]]:
    """(what it holds for `model`, shapes by key in the file, the open file) of a PEFT folder.

    Raises:
        CheckpointError: If the files are missing or damaged.
        AdapterMismatchError: If the adapter uses what this library or the model does not have.

    """
    options = _read_config(folder)
    config = parse(options, str(folder / CONFIG))
    file = folder / TENSORS
    with _opened(file) as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
        base = {plain_name(k): v for k, v in model.state_dict().items()}

        def unchanged(key: str, name: str) -> bool:
            return _same(base.get(name), opened.get_tensor(key))

        content = content_of_file(model, config, shapes, unchanged, repr(str(file)))
        content.adds_twice = adds_twice(options)
        yield content, shapes, opened


def read_values(
    model: nn.Module, content: FileContent, opened: Any, own: dict[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """The tensors for the adapter's `own`, by their keys, checked.

    Raises:
        AdapterMismatchError: If a value cannot be what was trained, or comes with another base.

    """
    values: dict[str, Tensor] = {}
    for key, name in content.own.items():
        value = opened.get_tensor(key)
        if content.adds_twice and name.endswith(OUT_PROJ_B):
            value = 2 * value
        if name in values and not torch.equal(values[name], value):
            raise AdapterMismatchError(
                f"{str(file)!r} holds {key!r} twice, under the names of one and the same module, "
                "with different values."
            )
        values[name] = value
    check_values(values, own, repr(str(file)))
    of_base = {name: opened.get_tensor(key) for key, name in content.of_base.items()}
    _check_base(model, of_base, file)
    return values


def _files(model: nn.Module, folder: Path, adapter_name: str) -> dict[Path, bytes]:
    known = adapter_names(model)
    if adapter_name not in known:
        hint = nearest_hint(adapter_name, known)
        raise AdapterStateError(
            f"No adapter {adapter_name!r} to save; the model has {known or 'none'}.{hint}"
        )
    config = describe(model, adapter_name)
    own = tensors_to_save(model, adapter_name)
    if config["peft_type"] == TOKENS:
        own = rows_alone(model, adapter_name)
    if not config["peft_type"].startswith(OWN):
        own |= tensors_of_base(
            model, also_saved_by_peft(model, config.get("modules_to_save") or [])
        )
        if doubled := [key for key in own if key.endswith(OUT_PROJ_B)]:
            config = for_twice(config)
            # Halved without rounding: float16 has too few bits for small numbers.
            own |= {key: own[key].to(_wide(own[key].dtype)) / 2 for key in doubled}
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
    return {folder / TENSORS: content, folder / CONFIG: _json(config)}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def _is_folder_name(name: str) -> bool:
    """Whether `name` is the name of a folder inside another one, and no path that leads out."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _load_folder(model: nn.Module, folder: Path, name: str, autocast: bool) -> None:
    if name in adapter_names(model):
        raise AdapterStateError(
            f"The model already has an adapter {name!r}. Take it off first with "
            f"delete_adapter(model, {name!r}), exchange its weights with hotswap_adapter, or load "
            "this one under another name."
        )
    file = folder / TENSORS
    with opened_folder(model, folder) as (content, shapes, opened):
        config = content.config
        # On the meta device first: a config can ask for any size.
        context = BuildContext(
            config,
            name,
            low_cpu_mem_usage=True,
            check_rank=False,
            autocast_adapter_dtype=autocast,
        )
        _inject(model, context, folder)
        own = tensors_to_load(model, name)
        loaded = {own_key: shapes[key] for key, own_key in content.own.items()}
        differences = tensor_differences(loaded, {k: list(t.shape) for k, t in own.items()})
        if differences:
            raise AdapterMismatchError(
                f"{str(file)!r} does not fit its config or this model:\n  "
                + "\n  ".join(differences)
            )
        values = read_values(model, content, opened, own, file)
    if config.starts_from_base:
        delete_adapter(model, name)
        _inject(model, replace(context, low_cpu_mem_usage=False), folder)
    materialize(model, name)
    with torch.no_grad():
        for key, tensor in tensors_to_load(model, name).items():
            tensor.copy_(values[key])


def _inject(model: nn.Module, context: BuildContext, folder: Path) -> None:
    try:
        extend_adapter(model, context)
    except LoraError:
        raise
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise AdapterMismatchError(
            f"{str(folder / CONFIG)!r} asks for what cannot be made: {error}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        options = json.loads(_config_bytes(folder))
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(file)!r} is no valid JSON: {error}") from None
    if not isinstance(options, dict):
        raise CheckpointError(
            f"{str(file)!r} holds a {type(options).__name__}, not an adapter's options."
        )
    return options


def _config_bytes(folder: Path) -> bytes:
    file = folder / CONFIG
    if not folder.exists():
        raise CheckpointError(
            f"There is no folder or file {str(folder)!r} to load an adapter from. (Nothing is "
            "fetched from a hub.)"
        )
    if not file.is_file():
        found = sorted(entry.name for entry in folder.iterdir())
        inner = [name for name in found if (folder / name / CONFIG).is_file()]
        hint = f" Give one of the adapter folders in it: {first_few(inner)}." if inner else ""
        raise CheckpointError(
            f"{str(folder)!r} is no adapter folder: it has no file {CONFIG}. It holds "
            f"{first_few(found, 8) or 'nothing'}.{hint}"
        )
    if file.stat().st_size > LARGEST_CONFIG:
        raise CheckpointError(f"{str(file)!r} is too large for an adapter's config.")
    return file.read_bytes()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if not file.is_file():
        old = file.with_name("adapter_model.bin")
        hint = (
            f" {old.name} is a pickle, which can run any code when it is read; save it as "
            "safetensors with PEFT (safe_serialization=True)."
            if old.is_file()
            else ""
        )
        raise CheckpointError(f"{str(file)!r} is missing.{hint}")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is damaged or no safetensors file: {error}") from None


def _check_base(model: nn.Module, values: dict[str, Tensor], file: Path) -> None:
    """Base tensors that PEFT saved along (embeddings) must be those of this base."""
    own = {plain_name(k): v for k, v in model.state_dict().items()} if values else {}
    for name, value in values.items():
        base = own.get(name)
        if not _same(base, value):
            found = "has none" if base is None else f"has other values, {list(base.shape)}"
            raise AdapterMismatchError(
                f"{str(file)!r} comes with {name!r} {list(value.shape)} of its base, but this "
                f"model {found}. Load the base that the adapter was trained on (resize its "
                "embeddings if the vocabulary was extended)."
            )


def _same(base: Tensor | None, value: Tensor) -> bool:
    if base is None or base.shape != value.shape:
        return False
    return torch.equal(base.detach().cpu().to(value), value)
