"""The fingerprint tells one base from another, whatever the device, the cast and the adapters."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import (
    LoraConfig,
    inject_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.checkpoint.fingerprint import (
    SAMPLE,
    base_fingerprint,
    digest,
    fingerprint_difference,
)
from lora_lightning.errors import AdapterMismatchError
from tests.helpers.tensors import randomize, trainable
from tests.helpers.torch_models import Transformer, token_ids


def difference(one: nn.Module, other: nn.Module) -> list[str]:
    return fingerprint_difference(base_fingerprint(one), base_fingerprint(other))


# -- what it does not mind ---------------------------------------------------------------------

CASTS = {  # from, to, whether every value survives
    "float32-float64": (torch.float32, torch.float64, True),
    "bfloat16-float32": (torch.bfloat16, torch.float32, True),
    "float16-float32": (torch.float16, torch.float32, True),
    "bfloat16-float64": (torch.bfloat16, torch.float64, True),
    "float32-bfloat16": (torch.float32, torch.bfloat16, False),
    "float32-float16": (torch.float32, torch.float16, False),
    "float64-float32": (torch.float64, torch.float32, False),
    "float16-bfloat16": (torch.float16, torch.bfloat16, False),
}


@pytest.mark.parametrize(("start", "end", "same"), CASTS.values(), ids=CASTS)
def test_casts(start, end, same):
    base = Transformer().double()
    for parameter in base.parameters():
        parameter.data += torch.randn_like(parameter) * 1e-3  # uses all bits of its dtype
    base.to(start)
    found = difference(base, copy.deepcopy(base).to(end))
    assert bool(found) is not same
    for line in found:
        assert line.endswith(f": other values (dtype {str(start)[6:]} there, {str(end)[6:]} here)")


def test_strides_and_requires_grad_do_not_matter():
    tensor = torch.randn(30, 20)
    assert digest(tensor) == digest(tensor.t().contiguous().t())
    assert digest(tensor) == digest(nn.Parameter(tensor))


OPTIONS = {
    "all-linear": {},
    "embedding": {"target_modules": ["embed", "q"]},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_adapters_training_and_merging_do_not_matter(options):
    model = Transformer()
    before = base_fingerprint(model)
    steps = {
        "injected": lambda: inject_adapter(model, LoraConfig(r=2, **options)),
        "trained": lambda: randomize(trainable(model).values()),
        "merged": lambda: merge_adapter(model),
        "unmerged": lambda: unmerge_adapter(model),
        "inactive": lambda: set_adapter(model, []),
        "active": lambda: set_adapter(model, "default"),
        "second": lambda: inject_adapter(model, LoraConfig(r=1), "second"),
        "unloaded": lambda: unload(model),
    }
    for step, action in steps.items():
        action()
        assert base_fingerprint(model) == before, step


def test_merged_rows_of_a_tied_table_do_not_matter():
    base = Transformer()
    base.head = nn.Linear(*base.embed.weight.T.shape)
    base.head.weight = base.embed.weight
    model = copy.deepcopy(base)
    tokens = {"embed": [1, 2]}
    inject_adapter(model, LoraConfig(target_modules=[], trainable_token_indices=tokens))
    randomize(trainable(model).values())
    merge_adapter(model)
    assert difference(model, base) == []


def test_folding_an_adapter_in_makes_another_base():
    model = Transformer()
    before = base_fingerprint(model)
    inject_adapter(model, LoraConfig(r=2, target_modules=["q"]))
    randomize(trainable(model).values())
    merge_and_unload(model)
    assert fingerprint_difference(before, base_fingerprint(model)) == [
        "layers.0.attn.q.weight: other values",
        "layers.1.attn.q.weight: other values",
    ]


def test_a_head_that_is_trained_in_full_is_left_out():
    """A new head is random in every process; it is no part of what must agree."""
    model = Transformer()
    inject_adapter(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]))
    names = set(base_fingerprint(model))
    assert names == {name for name, _ in Transformer().named_parameters() if "head" not in name}
    other = copy.deepcopy(model)
    randomize([other.head.weight])
    assert difference(model, other) == []
    randomize([other.norm.weight])
    assert difference(model, other) == ["norm.weight: other values"]


def test_buffers_count_if_they_are_saved():
    model = nn.Module()
    model.register_buffer("kept", torch.arange(3))
    model.register_buffer("scratch", torch.arange(3), persistent=False)
    model.register_buffer("none", None)
    other = copy.deepcopy(model)
    other.scratch += 1
    assert difference(model, other) == []
    other.kept += 1
    assert difference(model, other) == ["kept: other values"]


# -- what it notices ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from([1, 2, 1000, SAMPLE - 1, SAMPLE]), data=st.data())
def test_any_value_of_a_tensor_up_to_the_sample(size, data):
    tensor = torch.zeros(size)
    changed = tensor.clone()
    changed[data.draw(st.integers(0, size - 1))] = 1e-30
    assert digest(tensor) != digest(changed)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(SAMPLE + 1, 5 * SAMPLE), data=st.data())
def test_any_k_consecutive_values_of_a_larger_tensor(size, data):
    k = -(-size // SAMPLE)
    tensor = torch.zeros(size)
    first = data.draw(st.integers(0, size - k))
    changed = tensor.clone()
    changed[first : first + k] += 1
    assert digest(tensor) != digest(changed)


def test_fewer_than_k_values_may_slip_through():
    """What a sample costs; a digest without a limit sees it."""
    tensor = torch.zeros(3 * SAMPLE)
    changed = tensor.clone()
    changed[1:3] = 1
    assert digest(tensor) == digest(changed)
    assert digest(tensor, None) != digest(changed, None)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1 + 2j, 3j]),
        torch.tensor([True, False]),
        torch.tensor([2**53 + 1]),
        torch.tensor([3], dtype=torch.uint8),
        torch.tensor([], dtype=torch.float32),
        torch.tensor(1.5),
        torch.randn(4).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_every_dtype_has_a_digest(tensor):
    assert len(digest(tensor)) == 16
    if tensor.numel():
        other = tensor.clone().reshape(-1)
        other.view(torch.uint8)[0] ^= 1 if tensor.dtype == torch.bool else 16
        assert digest(other) != digest(tensor)


def test_another_seed_is_another_base():
    one = Transformer()
    torch.manual_seed(1)
    found = difference(one, Transformer())
    assert "head.weight: other values" in found
    assert not any("norm" in line for line in found)  # all ones and zeros in both


def test_the_difference_names_tensors_shapes_and_values():
    one = nn.ModuleDict(
        {"a": nn.Linear(2, 3), "b": nn.Linear(2, 2, bias=False), "c": nn.Linear(1, 1)}
    )
    other = nn.ModuleDict(
        {"a": nn.Linear(2, 4), "b": nn.Linear(2, 2, bias=False), "d": nn.Linear(1, 1)}
    )
    other["b"].to(torch.bfloat16)
    assert difference(one, other) == [
        "a.bias: shape [3] in the checkpoint, [4] here",
        "a.weight: shape [3, 2] in the checkpoint, [4, 2] here",
        "b.weight: other values (dtype float32 there, bfloat16 here)",
        "c.bias: not in this model",
        "c.weight: not in this model",
        "d.bias: not in the checkpoint's base",
        "d.weight: not in the checkpoint's base",
    ]


def test_it_survives_a_checkpoint():
    model = Transformer()
    file = io.BytesIO()
    torch.save(base_fingerprint(model), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == base_fingerprint(model)


def test_a_base_without_values_is_refused():
    with pytest.raises(AdapterMismatchError) as caught:
        base_fingerprint(nn.Sequential(nn.Linear(2, 2, device="meta")))
    assert "'0.weight' is on the meta device and holds no values" in str(caught.value)
    assert "load the base before training adapters on it" in str(caught.value)


def test_forward_and_backward_change_nothing():
    model = Transformer()
    before = base_fingerprint(model)
    inject_adapter(model, LoraConfig(r=2))
    model(token_ids()).sum().backward()
    torch.optim.SGD(trainable(model).values(), lr=1.0).step()
    assert base_fingerprint(model) == before
