"""LoftQ: LoRA that starts from what rounding took from the base weight.

    scaling * B A = argmin || W - (Q + scaling * B A) ||_F over matrices of rank r,

A (r, in), B (out, r), for the weight W that was quantised to Q: one turn of the paper's algorithm,
since Q is there and stays.

Source: Li et al. 2023, "LoftQ" (arXiv:2310.08659), section 3.2 and algorithm 1. There the scaling
is 1; here it is divided out of A and B, so that every lora_alpha starts from the same weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_lightning.adapters.lora.linear import LoraAdapter
from lora_lightning.errors import (
    AdapterMismatchError,
    AdapterStateError,
    CheckpointError,
    first_few,
)
from lora_lightning.layers.quantized.base import AdaptedQuantizedLinear
from lora_lightning.layers.traversal import named_adapted_layers


def error_factors(error: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B with scaling * B A = the best rank-r approximation of `error`, shared out evenly.

    A = sqrt(S_r / scaling) V_r^T, B = U_r sqrt(S_r / scaling) for error = U S V^T.
    """
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def original_weights(path: str | os.PathLike[str]) -> Callable[[str], Tensor]:
    """The tensors of a safetensors file, or of a folder of them, by name.

    Names may have more in front than in the file: a LightningModule holds `model.layers.0...` where
    the file has `layers.0...`.

    Raises:
        CheckpointError: If there is no such file.
        AdapterMismatchError: When a name is asked for that no file has.

    """
    place = Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise CheckpointError(
            f"There is no safetensors file {str(place)!r} to read the original weights from. "
            "(lora.loftq_config.weights)"
        )
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            where.update(dict.fromkeys(opened.keys(), file))

    def get(name: str) -> Tensor:
        parts = name.split(".")
        for first in range(len(parts)):
            short = ".".join(parts[first:])
            if short in where:
                with safe_open(where[short], "pt") as opened:
                    tensor: Tensor = opened.get_tensor(short)
                    return tensor
        raise AdapterMismatchError(
            f"{str(place)!r} has no tensor {name!r}; it has {first_few(where, 3)}. "
            "(lora.loftq_config.weights)"
        )

    return get


@torch.no_grad()
def start_from_rounding_error(
    model: nn.Module, original: Callable[[str], Tensor], adapter_name: str = "default"
) -> dict[str, tuple[float, float]]:
    """Start a LoRA adapter on quantised Linears from what their rounding took away.

    One turn of LoftQ: Q is the weight that is there and stays as it is, bit for bit. Everything is
    computed before the first adapter is changed.

    Args:
        model: A quantised model with the adapter, which has not trained yet.
        original: Gives the weight of before rounding, (out, in), by its name in the model's state
            dict: `safetensors.safe_open(file, "pt").get_tensor`, a state dict's `__getitem__`.
        adapter_name: The adapter; other kinds of modules that carry it are left alone.

    Returns:
        The error of each weight, ||W - Q|| / ||W|| and ||W - Q - scaling * B A|| / ||W||, by path.

    Raises:
        AdapterStateError: If no quantised Linear carries a plain LoRA adapter of that name, or it
            is merged.
        AdapterMismatchError: If an original has another shape, or values that are not finite.

    """
    starts = []
    errors: dict[str, tuple[float, float]] = {}
    for path, layer in named_adapted_layers(model):
        if not isinstance(layer, AdaptedQuantizedLinear) or adapter_name not in layer.adapters:
            continue
        adapter = layer.adapters[adapter_name]
        if not isinstance(adapter, LoraAdapter):
            continue
        if adapter_name in layer.merged_adapters or adapter.needs_weight:
            reason = "already starts from the rounded weight (DoRA, PiSSA, OLoRA)"
            reason = "is merged" if adapter_name in layer.merged_adapters else reason
            raise AdapterStateError(
                f"Adapter {adapter_name!r} of {path!r} {reason}; LoftQ cannot give it another "
                "start. (lora.init_lora_weights)"
            )
        rounded = layer.base_weight()
        weight = original(f"{path}.weight" if path else "weight").to(rounded)
        if weight.shape != rounded.shape or not torch.isfinite(weight).all():
            found = f"{tuple(weight.shape)}, expected {tuple(rounded.shape)}"
            found = found if weight.shape != rounded.shape else "not finite"
            raise AdapterMismatchError(f"The original weight of {path!r} is {found}.")
        error = weight - rounded
        a, b = error_factors(error, adapter.r, adapter.scaling)
        size = weight.norm()
        left = error - adapter.scaling * b @ a
        errors[path] = (float(error.norm() / size), float(left.norm() / size))
        starts.append((adapter, a, b))
    if not starts:
        raise AdapterStateError(
            f"No quantised Linear of this model carries a LoRA adapter {adapter_name!r}. Load the "
            "base in 4 or 8 bits and inject the adapter first."
        )
    for adapter, a, b in starts:
        adapter.lora_A.copy_(a)
        adapter.lora_B.copy_(b)
    return errors
