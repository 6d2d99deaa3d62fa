"""Checksums see every bit of a tensor, and nothing else than its bits, dtype and shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_lightning.checkpoint import checksum as module
from lora_lightning.checkpoint.checksum import CHUNK, checksums

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float8_e4m3fn]


def checksum(tensor: Tensor) -> str:
    return checksums({"t": tensor})["t"]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).mul(9).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, CHUNK + 3)])
def test_any_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = values(*shape, dtype=dtype)
    before, size = checksum(tensor), tensor.numel()
    whole = tensor.numpy() if dtype.itemsize > 1 and dtype != torch.bfloat16 else None
    flat = tensor.view(torch.uint8).flatten() if whole is None else whole.view(np.uint8).reshape(-1)
    for place in {0, len(flat) // 2, len(flat) - 1}:
        for bit in range(8):
            flat[place] ^= 1 << bit
            assert checksum(tensor) != before, (place, bit, size)
            flat[place] ^= 1 << bit
    assert checksum(tensor) == before


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "every sign": lambda t: -t,
    "two signs": lambda t: torch.cat([-t[:2], t[2:]]),
    "rows exchanged": lambda t: t[[1, 0, *range(2, len(t))]],
    "reversed": lambda t: t.flip(1),
    "another shape": lambda t: t.reshape(-1),
    "another dtype": lambda t: t.view(torch.int64 if t.dtype == torch.float64 else torch.int32),
    "chunks exchanged": lambda t: t.roll(len(t) // 2, 0),
    "one up, one down": lambda t: t + torch.eye(len(t), t.shape[1]).to(t) - torch.eye(*t.shape).to(t).roll(1, 0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_plain_sums_overlook(change: str, dtype: torch.dtype) -> None:
    tensor = values(16, CHUNK // 4, dtype=dtype)
    assert checksum(CHANGES[change](tensor)) != checksum(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_and_how_it_lies_does_not_matter(dtype: torch.dtype) -> None:
    tensor = values(7, 11, dtype=dtype)
    wide = torch.zeros(7, 23, dtype=dtype)
    wide[:, 1:23:2] = tensor
    odd = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(7, 11)
    for other in (tensor.clone(), tensor.t().contiguous().t(), wide[:, 1:23:2], odd):
        assert checksum(other) == checksum(tensor)


def test_conjugate_and_negative_views() -> None:
    z = torch.complex(values(4), values(4) + 1)
    assert checksum(z.conj()) == checksum(z.conj().resolve_conj()) != checksum(z)
    assert checksum(z.conj().imag) == checksum(z.conj().resolve_conj().imag.clone())


def test_other_devices_add_up_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {str(n): values(n) for n in (1, CHUNK, 2 * CHUNK, 70 * CHUNK + 5)}
    here = checksums(tensors)

    class Elsewhere:
        type = "cuda"

    known = module._weights(torch.device("cpu"))
    monkeypatch.setattr(module, "_device", lambda words: Elsewhere())
    monkeypatch.setattr(module, "_weights", lambda device: known)
    assert checksums(tensors) == here


def test_nothing_is_drawn_and_empty_tensors_differ_by_shape() -> None:
    module._weights.cache_clear()
    before = torch.get_rng_state()
    empty = checksums({"a": torch.zeros(0), "b": torch.zeros(0, 3), "c": torch.zeros(())})
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(empty.values())) == 3


@pytest.mark.gpu
def test_cuda_says_the_same() -> None:
    tensor = values(3, CHUNK)
    assert checksum(tensor.cuda()) == checksum(tensor)
