"""Checksums of whole tensors, at the speed of memory: has anything written into a frozen base?

Nothing that torch counts says so: `p.data = ...`, `p.data.mul_(...)` and a write through NumPy
bump no version. So every bit is read. A tensor's bytes are taken as 64-bit words x_i, in chunks of
2^16, and of each chunk two sums are kept, with fixed random odd weights w_i and modulo 2^64:

    sum_i w_i x_i      and      sum_i w_i floor(x_i / 2^32)

The second is there for the highest bits, which multiplication would shift out (a change of all
signs, say). A change goes unnoticed with a probability below 2^-32; so does an exchange of values,
as each place has a weight of its own. Whole numbers are added alike on every device, in any order.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 2**16  # words; their weights stay in a CPU's cache
_AT_ONCE = 64  # chunks, where each call has its price


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A checksum of every bit of each tensor, and of its dtype and shape; the same for same bits.

    Each device is waited for once.
    """
    sums: dict[str, list[Tensor]] = {name: _sums(tensor) for name, tensor in tensors.items()}
    on_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for found in sums.values():
        for one in found:
            on_device[one.device].append(one)
    values = {device: iter(torch.stack(many).tolist()) for device, many in on_device.items()}
    checked: dict[str, str] = {}
    for name, tensor in tensors.items():
        whole = [tensor.dtype, tuple(tensor.shape), *(next(values[s.device]) for s in sums[name])]
        checked[name] = hashlib.sha256(repr(whole).encode()).hexdigest()[:16]
    return checked


def _sums(tensor: Tensor) -> list[Tensor]:
    words = _words(tensor)
    device = _device(words)
    weights = _weights(device)
    if device.type == "cpu":  # `dot` makes no product in memory, but knows integers here only
        chunks = words.split(CHUNK)
        return [half.dot(weights[: len(c)]) for c in chunks for half in (c, c >> 32)]
    found: list[Tensor] = []
    for many in words.split(_AT_ONCE * CHUNK):
        rows = many[: len(many) // CHUNK * CHUNK].view(-1, CHUNK)
        rest = many[rows.numel() :]
        sums = [(half * weights).sum(1) for half in (rows, rows >> 32)]
        found += torch.stack(sums, dim=1).flatten().unbind()
        if len(rest):
            found += [(half * weights[: len(rest)]).sum() for half in (rest, rest >> 32)]
    return found


def _device(words: Tensor) -> torch.device:
    return words.device


def _words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as int64 (n,), filled up with zeros; without a copy where it can be."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    data = tensor.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    rest = -len(data) % 8
    if rest:
        data = torch.cat([data, data.new_zeros(rest)])
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


@lru_cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # of its own: training draws what it would draw
    drawn = torch.randint(-(2**63), 2**63 - 1, (CHUNK,), generator=generator)
    return (drawn | 1).to(device)
