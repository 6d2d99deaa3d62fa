"""Content hashes: what differs hashes differently, what does not matter alike."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from lora_lightning.checkpoint.integrity import content_hash

VALUES: list[Any] = [
    0, 1, -1, True, False, None, 0.0, -0.0, 1.0, 1e-300, "", "a", "1", b"a", b"", 1j,
    [], (), {}, set(), [1], (1,), {1}, {"a": 1}, {"a": 1, "b": 2}, {"b": 2, "a": 1}, [[1], 2], [1, [2]],
    ["ab", "c"], ["a", "bc"], torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("meta"),
    torch.zeros(2), torch.zeros(3), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32),
    torch.zeros(2, dtype=torch.bfloat16), torch.tensor(0.0), torch.tensor([0.0]), torch.tensor([-0.0]),
    torch.tensor([True]), torch.zeros(0), torch.zeros(0, 1), torch.tensor([1j]),
    torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0).reshape(3, 2),
]  # fmt: skip


def test_values_that_differ_hash_differently() -> None:
    assert len({content_hash(value) for value in VALUES}) == len(VALUES)
    assert content_hash({"a": VALUES}) == content_hash({"a": VALUES})


def test_what_does_not_matter_hashes_alike() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert content_hash(x[1:, ::2]) == content_hash(x[1:, ::2].clone())
    assert content_hash(torch.tensor([1j]).conj()) == content_hash(torch.tensor([complex(0, -1)]))
    assert content_hash(OrderedDict(a=1)) == content_hash({"a": 1})
    assert content_hash(nn.Parameter(x)) == content_hash(x)
    assert content_hash(torch.Size([1])) == content_hash((1,))
    assert content_hash({3, 1, 2}) == content_hash({1, 2, 3})


def test_tensors_without_plain_bytes_count_by_their_kind() -> None:
    sparse = torch.eye(3).to_sparse()
    assert content_hash(sparse) == content_hash((2 * torch.eye(3)).to_sparse())
    assert content_hash(sparse) != content_hash(torch.eye(3))
    for dtype in (torch.float8_e4m3fn, torch.complex64, torch.uint16, torch.bool):
        one, other = torch.zeros(3).to(dtype), torch.ones(3).to(dtype)
        assert content_hash(one) == content_hash(one.clone()) != content_hash(other)
