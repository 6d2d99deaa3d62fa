"""Fingerprints of base models, made without reading all of a large one.

Every base tensor is recorded with its shape, its dtype and a digest of up to 65,536 of its
values: all of them up to that size, beyond it every k-th with k = ceil(size / 65,536). So a change
of any k consecutive values is certain to be noticed, and in smaller tensors a change of any value.
Values are hashed as float64 (integers as int64): the device, and a cast that keeps the values
(bf16 to fp32, say), do not matter. A 70B model takes about 0.4 GB of reading.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.modules_to_save import base_tensors_of
from lora_lightning.engine.bias import trained_biases
from lora_lightning.errors import AdapterMismatchError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.offloading import weights_in_place
from lora_lightning.layers.quantized.base import packed_weight
from lora_lightning.layers.traversal import named_adapted_layers, walk
from lora_lightning.utilities.dtensor import full_tensor

SAMPLE = 65_536

# name -> [shape, dtype, digest]: plain values, so that `torch.load(weights_only=True)` reads it.
Fingerprint = dict[str, list[Any]]


def base_tensors(
    model: nn.Module, quantized: bool = True, replaced: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the base model as it was before any adapter.

    Merged weights and trained biases give their original values. What a trained copy replaces
    (a new head) is left out, as it does not take part in the model any more, but for parameters
    where `replaced` asks for them. `quantized` tells whether weights in few bits are wanted, too.
    """
    # By identity: a weight can be shared, and a bias have several names.
    originals: dict[int, Tensor] = {}
    for _, layer in named_adapted_layers(model):
        for name, original in layer.kept_tensors().items():
            originals[id(layer._parameters.get(name))] = original
    for _, module, record in trained_biases(model):
        originals[id(record.parameter(module))] = record.original(module)
    copied: list[str] = []
    for path, module in walk(model):
        if isinstance(module, AdaptedLayer) and module.trained_copies():
            copied.append(path + ".")
        prefix = path + "." if path else ""
        if any(prefix.startswith(outer) for outer in copied):
            held = base_tensors_of(module).named_parameters(recurse=False) if replaced else ()
            yield from ((prefix + name, parameter) for name, parameter in held)
            continue
        with weights_in_place(module):
            tensors = dict([*module.named_parameters(recurse=False), *persistent_buffers(module)])
        packed = packed_weight(module)
        if packed is not None:  # with its scales: the same indices stand for W and for 2 W
            del tensors["weight"]
            tensors |= packed.tensors() if quantized else {}
        kept = module.kept_tensors() if isinstance(module, AdaptedLayer) else {}
        for name, tensor in tensors.items():
            yield prefix + name, originals.get(id(tensor), kept.get(name, tensor))


def base_fingerprint(model: nn.Module) -> Fingerprint:
    """Shape, dtype and digest of every base tensor, by name; on the meta device it is refused."""
    fingerprint: Fingerprint = {}
    for name, tensor in base_tensors(model):
        if tensor.is_meta:
            raise AdapterMismatchError(
                f"The base model's {name!r} is on the meta device and holds no values: load the "
                "base before training adapters on it."
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        fingerprint[name] = [list(tensor.shape), dtype, digest(tensor)]
    return fingerprint


def fingerprint_difference(saved: Fingerprint, found: Fingerprint) -> list[str]:
    """Differences between two bases, a line each; empty for the same base."""
    lines = []
    for name in saved.keys() | found.keys():
        if name not in found:
            lines.append(f"{name}: not in this model")
        elif name not in saved:
            lines.append(f"{name}: not in the checkpoint's base")
        elif saved[name][0] != found[name][0]:
            lines.append(f"{name}: shape {saved[name][0]} in the checkpoint, {found[name][0]} here")
        elif saved[name][2] != found[name][2]:
            cast = f" (dtype {saved[name][1]} there, {found[name][1]} here)"
            lines.append(f"{name}: other values{cast if saved[name][1] != found[name][1] else ''}")
    return sorted(lines)


def base_mismatch(whose: str, model: nn.Module, saved: Fingerprint, found: Fingerprint) -> str:
    """What to say of adapters whose base is not `model`, with the fingerprint `found`; else ""."""
    lines = fingerprint_difference(saved, found)
    if not lines:
        return ""
    dtypes = _other_precision(model, saved, found)
    if dtypes is not None:
        there, here, verb = dtypes
        return (
            f"{whose} were trained on a base in {there}, and this one, which {verb} the same, is "
            f"in {here}: its values are rounded otherwise. Nothing was loaded. Load the base in "
            f"{there}. (model.dtype, trainer.precision)"
        )
    shown = "".join(f"\n  {line}" for line in lines[:4]) + ("\n  ..." if len(lines) > 4 else "")
    return (
        f"{whose} were trained on another base model; nothing was loaded. {len(lines)} of "
        f"{len(saved)} base tensors differ:{shown}\nLoad the base that they were trained on, in "
        "the same precision; a base with random weights needs the same seed. (model)"
    )


def _other_precision(
    model: nn.Module, saved: Fingerprint, found: Fingerprint
) -> tuple[str, str, str] | None:
    """(dtype there, dtype here, "is" or "can be") where precision explains every difference."""
    names = [name for name in saved.keys() & found.keys() if saved[name][2] != found[name][2]]
    if len(fingerprint_difference(saved, found)) > len(names):
        return None
    tensors = dict(base_tensors(model))
    verb = "is"
    for name in names:
        there, here = _floating(saved[name][1]), _floating(found[name][1])
        if there is None or here is None or there == here:
            return None
        if there.itemsize >= here.itemsize or name not in tensors:
            verb = "can be"  # what was rounded away here cannot be compared
        elif digest(tensors[name].to(there)) != saved[name][2]:
            return None
    first = sorted(names)[0]
    return saved[first][1], found[first][1], verb


def _floating(name: str) -> torch.dtype | None:
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def digest(tensor: Tensor, limit: int | None = SAMPLE) -> str:
    """Hex digest of `limit` evenly spaced values (None: of all)."""
    flat = full_tensor(tensor.detach()).reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if limit is not None:
        flat = flat[:: max(1, math.ceil(flat.numel() / limit))]
    exact = torch.float64 if flat.is_floating_point() else torch.int64
    values = flat.to("cpu").to(exact).contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The module's own buffers that its state dict holds."""
    return [
        (name, buffer)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
