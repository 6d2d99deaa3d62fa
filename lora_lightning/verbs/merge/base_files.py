"""The safetensors files of a pretrained model, read tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lightning.errors import ModelError
from lora_lightning.utilities.hub import resolve_model_path

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class BaseFiles:
    """Where each tensor lies, and what it is, by its name in the files.

    Attributes:
        home: The file of each tensor.
        meta: Its shape and dtype: a tensor without values.

    """

    home: dict[str, Path]
    meta: dict[str, Tensor]

    def tensor(self, key: str) -> Tensor:
        """The values of one tensor; memory of the file, not of the process."""
        with _damage_named(self.home[key]), safe_open(self.home[key], "pt") as file:
            value: Tensor = file.get_tensor(key)
        return value


def base_files(name: str, revision: str | None) -> BaseFiles | None:
    """The files of a model by its name; None where it has no safetensors.

    Raises:
        ModelError: If a file is missing or damaged.

    """
    index = _find(name, _INDEX, revision)
    if index is None:
        single = _find(name, _SINGLE, revision)
        if single is None:
            return None
        files = [single]
    else:
        files = []
        for named in _files_of(index):
            found = _find(name, named, revision)
            if found is None:
                raise ModelError(
                    f"{str(index)!r} names {named!r}, which is not there: the model is not "
                    "complete. Fetch it again. (model.model)"
                )
            files.append(found)
    home: dict[str, Path] = {}
    meta: dict[str, Tensor] = {}
    for file in files:
        with _damage_named(file), safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                home[key] = file
                part = opened.get_slice(key)
                dtype = getattr(torch, _DTYPES.get(part.get_dtype(), ""), None)
                if dtype is None:
                    raise ModelError(
                        f"{str(file)!r} holds {key!r} as {part.get_dtype()}, which torch does not "
                        "have. (model.model)"
                    )
                meta[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return BaseFiles(home, meta)


# What safetensors calls torch's dtypes.
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


class _damage_named:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, (SafetensorError, OSError)):
            raise ModelError(
                f"{str(self.file)!r} cannot be read: {error}. Fetch the model again. (model.model)"
            ) from error


def _find(name: str, file: str, revision: str | None) -> Path | None:
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            resolve_model_path(name),
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise ModelError(f"{name!r}: {str(error).splitlines()[0]} (model.model)") from error
    return None if found is None else Path(found)


def _files_of(index: Path) -> list[str]:
    try:
        named = {str(file) for file in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{str(index)!r} does not say which files the model has: {error!r}. (model.model)"
        ) from error
    outside = [file for file in named if Path(file).name != file]
    if outside:
        raise ModelError(
            f"{str(index)!r} names {outside[0]!r}, which is not in the model's own folder. "
            "(model.model)"
        )
    return sorted(named)
