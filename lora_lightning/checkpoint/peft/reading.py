"""Adapters out of PEFT folders: adapter_config.json beside adapter_model.safetensors.

Source: the files that peft 0.21.2 writes and reads. A folder is untrusted input: everything is
checked before the model is touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterModule
from lora_lightning.checkpoint.compatibility import check_values, tensor_differences
from lora_lightning.checkpoint.peft.base_model import head_names
from lora_lightning.checkpoint.peft.config import (
    CONFIG,
    MADE_FOR,
    MIX,
    OWN,
    TENSORS,
    adds_twice,
    is_folder_name,
    parse,
)
from lora_lightning.checkpoint.peft.file_content import FileContent, Origin, content_of_file
from lora_lightning.checkpoint.peft.keys import OUT_PROJ_B, tensors_to_load
from lora_lightning.checkpoint.peft.saved_base import (
    added_rows,
    base_state,
    check_no_rows,
    is_same,
    rows_of_file,
)
from lora_lightning.checkpoint.state_dict import materialize
from lora_lightning.engine.construction import BuildContext
from lora_lightning.engine.injection import adapters_named, delete_adapter, extend_adapter
from lora_lightning.engine.switching import adapter_names
from lora_lightning.engine.targets.checks import check_not_of_peft
from lora_lightning.errors import (
    AdapterMismatchError,
    AdapterStateError,
    CheckpointError,
    LoraError,
    first_few,
)
from lora_lightning.layers.traversal import named_adapted_layers

LARGEST_CONFIG = 10_000_000  # bytes


def load_folders(
    model: nn.Module, folder: Path, adapter_name: str | None, autocast_adapter_dtype: bool
) -> list[str]:
    """Put the adapter of a PEFT folder on `model`, or all adapters of a folder of folders.

    Their names are returned; the errors are those of `load_adapter`.
    """
    options = read_config(folder)
    if options.get("peft_type") != MIX:
        name = "default" if adapter_name is None else adapter_name
        _load_folder(model, folder, name, options, autocast_adapter_dtype)
        return [name]
    names = options.get("adapters")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{str(folder / CONFIG)!r} does not list the adapters of its folder.")
    if adapter_name is not None:
        raise AdapterStateError(
            f"{str(folder)!r} holds the adapters {names}, which keep their names; load one of "
            f"them from its own folder to give it the name {adapter_name!r}."
        )
    if not names or not all(map(is_folder_name, names)):
        raise CheckpointError(
            f"{str(folder / CONFIG)!r} names {names} as its adapters, not folders beside it."
        )
    for name in names:
        inner = folder / name
        _load_folder(model, inner, name, read_config(inner), autocast_adapter_dtype)
    return names


@contextmanager
def opened_folder(
    model: nn.Module, folder: Path, options: dict[str, Any] | None = None
) -> Iterator[tuple[FileContent, dict[str, list[int]], Any]]:
    """(what it holds for `model`, shapes by key in the file, the open file) of a PEFT folder."""
    options = read_config(folder) if options is None else options
    config = parse(options, str(folder / CONFIG))
    file = folder / TENSORS
    with _opened(file) as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
        base = base_state(model)

        def unchanged(key: str, name: str) -> bool:
            return is_same(base.get(name), opened.get_tensor(key))

        made_for = (opened.metadata() or {}).get(MADE_FOR, "")
        origin = Origin(made_for, head_names(options.get("task_type")))
        content = content_of_file(model, config, shapes, unchanged, origin, repr(str(file)))
        content.adds_twice = adds_twice(options)
        content.of_peft = not options["peft_type"].startswith(OWN)
        yield content, shapes, opened


def read_values(
    content: FileContent, opened: Any, own: dict[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """The tensors for the adapter's `own`, by their keys."""
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
    return values


def read_base(content: FileContent, opened: Any) -> dict[str, Tensor]:
    """The tensors of the base that the file holds, by their names in the model."""
    return {name: opened.get_tensor(key) for key, name in content.of_base.items()}


def check_means_the_same(
    model: nn.Module, content: FileContent, adapters: Mapping[str, AdapterModule], file: Path
) -> None:
    """Refuse a file of PEFT's on a layer that PEFT computes otherwise than this library.

    Raises:
        AdapterMismatchError: Naming the layer.

    """
    layers = dict(named_adapted_layers(model)) if content.of_peft else {}
    for path, adapter in adapters.items() if content.of_peft else ():
        if adapter.by_weight() and not layers[path].peft_supports(adapter):
            raise AdapterMismatchError(
                f"{str(file)!r} is of PEFT's type {adapter.config.peft_type}, but what PEFT "
                f"computes from it on {path!r} ({layers[path].base_type.__name__}) is not what "
                "lora_lightning computes there: a convolution's padding mode, dilation or kernel, "
                "or a forward of the module's own, are treated otherwise. Merge it into the base "
                "with PEFT (merge_and_unload) and use that, or train an adapter here."
            )


def _load_folder(
    model: nn.Module, folder: Path, name: str, options: dict[str, Any], autocast: bool
) -> None:
    check_not_of_peft(model)
    others = adapter_names(model)
    if name in others:
        raise AdapterStateError(
            f"The model already has an adapter {name!r}. Take it off first with "
            f"delete_adapter(model, {name!r}), exchange its weights with hotswap_adapter, or load "
            "this one under another name."
        )
    file = folder / TENSORS
    with opened_folder(model, folder, options) as (content, shapes, opened):
        config = content.config
        # On the meta device first: a config can ask for any size.
        context = BuildContext(
            config, name, low_cpu_mem_usage=True, check_rank=False, autocast_adapter_dtype=autocast
        )
        _inject(model, context, folder)
        check_means_the_same(model, content, adapters_named(model, name), file)
        own = tensors_to_load(model, name)
        loaded = {own_key: shapes[key] for key, own_key in content.own.items()}
        differences = tensor_differences(loaded, {k: list(t.shape) for k, t in own.items()})
        if differences:
            raise AdapterMismatchError(
                f"{str(file)!r} does not fit its config or this model:\n  "
                + "\n  ".join(differences)
            )
        values = read_values(content, opened, own, file)
        saved = read_base(content, opened)
        rows = added_rows(model, saved, file)
        check_no_rows(rows, others, file)
    with rows_of_file(model, saved, rows):
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


def read_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json; CheckpointError if it is missing or damaged."""
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
