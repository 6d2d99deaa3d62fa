"""Tensors of the base that PEFT saves along with an adapter: embeddings and heads, mostly.

They must be those of the base that the adapter is loaded onto. Only the rows of tokens that were
added to the vocabulary start at random, differently in every process: those come from the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lightning.checkpoint.fingerprint import base_tensors
from lora_lightning.engine.targets.embeddings import input_embeddings, output_heads
from lora_lightning.errors import AdapterMismatchError
from lora_lightning.utilities.wrappers import plain_name


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict by plain names; those of offloaded modules have values."""
    entries = model.state_dict().items()
    state = {plain_name(name): value for name, value in entries if isinstance(value, Tensor)}
    if any(tensor.is_meta for tensor in state.values()):
        state |= {name: tensor for name, tensor in base_tensors(model) if name in state}
    return state


def is_same(base: Tensor | None, value: Tensor) -> bool:
    """Tell whether the base has this very value."""
    if base is None or base.is_meta or base.shape != value.shape:
        return False
    return torch.equal(base.detach().cpu().to(value), value)


def added_rows(model: nn.Module, saved: Mapping[str, Tensor], file: Path) -> dict[str, int]:
    """Compare what a file has of the base with `model`; the first row to take from it, by name.

    Raises:
        AdapterMismatchError: If the base is another one.

    """
    own = base_state(model) if saved else {}
    tables = {f"{path}." for path in (*input_embeddings(model), *output_heads(model))}
    rows = {}
    for name, value in saved.items():
        base = own.get(name)
        if is_same(base, value):
            continue
        first = _first_added(base, value) if name.rpartition(".")[0] + "." in tables else 0
        if not first:
            found = "has none" if base is None else f"has other values, {list(base.shape)}"
            raise AdapterMismatchError(
                f"{str(file)!r} comes with {name!r} {list(value.shape)} of its base, but this "
                f"model {found}. Load the base that the adapter was trained on (resize its "
                "embeddings if the vocabulary was extended)."
            )
        rows[name] = first
    return rows


def _first_added(base: Tensor | None, value: Tensor) -> int:
    """First of the rows, up to the last one, that differ; 0 where that is no added vocabulary."""
    if base is None or base.is_meta or base.shape != value.shape:
        return 0
    if not value.is_floating_point() or not torch.isfinite(value).all():
        return 0
    equal = (base.detach().cpu().to(value) == value).reshape(len(value), -1).all(1)
    first = int(equal.logical_not().nonzero()[0])
    zero = (value == 0).reshape(len(value), -1).all(1)  # which tells nothing: padding, biases
    known = bool((equal & ~zero)[:first].any())
    return first if known and not (equal & ~zero)[first:].any() else 0


def check_no_rows(rows: Mapping[str, int], others: list[str], file: Path) -> None:
    """Refuse added rows for a base on which `others` were trained, or loaded, with other ones.

    Raises:
        AdapterMismatchError: Naming the tensors and the adapters.

    """
    if rows and others:
        raise AdapterMismatchError(
            f"{str(file)!r} comes with rows of its own for tokens that were added to the "
            f"vocabulary ({', '.join(rows)}), but the adapters {others} on this model go with "
            "other values there. Load each of them onto a base of its own."
        )


@contextmanager
def rows_of_file(
    model: nn.Module, saved: Mapping[str, Tensor], rows: Mapping[str, int]
) -> Iterator[None]:
    """Put the added rows into the base; on an error inside, what was there before.

    Raises:
        AdapterMismatchError: If one of them is offloaded.

    """
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    places = {name: state[name][first:] for name, first in rows.items()}
    for name, place in places.items():
        if place.is_meta:
            raise AdapterMismatchError(
                f"The file has rows of added tokens for {name!r}, which is offloaded (accelerate) "
                "and cannot be written. Load the model without offloading that module."
            )
    before = {name: place.clone() for name, place in places.items()}
    try:
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(saved[name][rows[name] :])
        yield
    except BaseException:
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(before[name])
        raise
