"""Checks that what a file holds fits an adapter: names and shapes, options, values."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.errors import AdapterMismatchError, first_few


def tensor_differences(saved: Mapping[str, list[int]], found: Mapping[str, list[int]]) -> list[str]:
    """Differences between the tensors of a checkpoint and those of a model, a line per kind."""
    missing = sorted(found.keys() - saved.keys())
    extra = sorted(saved.keys() - found.keys())
    shapes = [
        f"{key} {saved[key]} in the checkpoint, {found[key]} here"
        for key in sorted(saved.keys() & found.keys())
        if list(saved[key]) != list(found[key])
    ]
    kinds = {
        "missing in the checkpoint": first_few(missing),
        "only in the checkpoint": first_few(extra),
        "other shape": first_few(shapes, 2),
    }
    return [f"{kind}: {names}" for kind, names in kinds.items() if names]


def config_differences(saved: Mapping[str, Any], config: AdapterConfig) -> list[str]:
    """The options in which a checkpoint's adapter computes something else, a line each."""
    differences = []
    for spec in dataclasses.fields(config):
        value: Any = getattr(config, spec.name)
        default = spec.default_factory() if callable(spec.default_factory) else spec.default
        there = saved.get(spec.name, default)  # an option that is younger than the checkpoint
        if spec.name not in config.free_to_change and there != value:
            differences.append(
                f"{spec.name}: {there!r} in the checkpoint, {value!r} here (lora.{spec.name})"
            )
    known = {spec.name for spec in dataclasses.fields(config)}
    other = type(config).from_dict({k: v for k, v in saved.items() if k in known})
    if other.starts_from_base != config.starts_from_base:
        one, two = (getattr(c, "init_lora_weights", None) for c in (other, config))
        differences.append(
            f"init_lora_weights: {one!r} in the checkpoint, {two!r} here (lora.init_lora_weights)"
        )
    return differences


def check_values(values: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors out of the file `where` that cannot be what was trained.

    Floating point of 16, 32 or 64 bits fits any such in `own`, integers any integers.

    Raises:
        AdapterMismatchError: If a value is of another kind than here, or not finite in the dtype
            that it has here.

    """
    for name, value in values.items():
        if _kind(value.dtype) is None or _kind(value.dtype) != _kind(own[name].dtype):
            raise AdapterMismatchError(
                f"{where} holds {name!r} as {value.dtype}, which cannot be loaded as "
                f"{own[name].dtype}."
            )
        if value.is_floating_point() and not torch.isfinite(value.to(own[name].dtype)).all():
            raise AdapterMismatchError(
                f"{where} holds values that are not finite (NaN or infinity) in {name!r}: the "
                "adapter has diverged, or the file is damaged."
            )


def not_finite(state: Mapping[str, Tensor], trained: Collection[str]) -> list[str]:
    """The names of the tensors in `state` with values that no sound run leaves.

    That is NaN, and in what is `trained` infinity: a metric's least value so far starts out there.
    """
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not (torch.isfinite(value) if name in trained else ~torch.isnan(value)).all()
    ]


def _kind(dtype: torch.dtype) -> str | None:
    if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize < 2):
        return None
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "integer"
