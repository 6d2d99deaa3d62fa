"""Every row of a batch with its own adapter: as a batch of its own for each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import (
    LoraConfig,
    active_adapters,
    adapters_per_row,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.traversal import named_parameters
from tests.helpers.adapted_models import CLOSE, LAYER_KINDS, LayerAndHead, add_adapter, small_llama
from tests.helpers.tensors import bit_equal
from tests.helpers.torch_models import Transformer, token_ids
from tests.helpers.unchanged import unchanged_check

ROWS = ["a", None, "b", "a", "other place"]


def row_by_row(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    """The truth: a batch of its own for every row."""
    before = active_adapters(model)
    results = []
    for row, name in zip(x.split(1), names, strict=True):
        set_adapter(model, [name] if name else [])
        results.append(model(row))
    set_adapter(model, before)
    return torch.cat(results)


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {n: p.grad for n, p in named_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_rows_are_what_batches_of_their_own_are(kind: str, options: dict) -> None:
    if kind == "grouped" and "use_dora" in options:
        return  # not defined: see test_parity.py
    torch.manual_seed(0)
    model = LayerAndHead(kind).double()
    add_adapter(model, "a", target_modules=["proj"], **options)
    add_adapter(model, "b", target_modules=["proj"], modules_to_save=["head"], r=4)
    add_adapter(model, "other place", target_modules=["head"])
    x = LAYER_KINDS[kind][1]()
    x = x.double() if x.is_floating_point() else x
    expected = row_by_row(model, x, ROWS)
    set_adapter(model, ["a", "other place"])  # which plays no part inside
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with adapters_per_row(model, ROWS):
        found = model(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    grads = gradients(model, found)
    assert {n.split(".adapters.")[1].split(".")[0] for n in grads if ".adapters." in n} == {
        "a", "b", "other place",
    }  # fmt: skip
    model.zero_grad()
    for row, name in zip(x.split(1), ROWS, strict=True):
        set_adapter(model, [name] if name else [])
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model(row).square().sum().backward()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, **CLOSE)


def test_rows_of_none_are_the_base() -> None:
    torch.manual_seed(0)
    base = Transformer().double()
    model = add_adapter(
        copy.deepcopy(base), "a", target_modules=["q", "embed"], modules_to_save=["head"]
    )
    with adapters_per_row(model, [None, None]):
        assert bit_equal(model(token_ids()), base(token_ids()))
    assert not torch.allclose(model(token_ids()), base(token_ids()))


def test_generate_with_a_cache_keeps_every_row_with_its_adapter() -> None:
    model = small_llama()
    add_adapter(model, "a")
    add_adapter(model, "b", target_modules=["q_proj", "embed_tokens"])
    prompt = torch.tensor([[1, 5, 3]]).expand(4, 3)
    names = ["b", None, "a", "b"]
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt),
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with adapters_per_row(model, names):
        found = model.generate(prompt, **options)
    options["attention_mask"] = options["attention_mask"][:1]
    for i, name in enumerate(names):
        set_adapter(model, [name] if name else [])
        alone = model.generate(prompt[:1], **options)
        assert torch.equal(found.sequences[i], alone.sequences[0])
        for together, single in zip(found.logits, alone.logits, strict=True):
            torch.testing.assert_close(together[i], single[0], **CLOSE)
    assert len({tuple(row.tolist()) for row in found.sequences}) == 3


def test_what_rows_refuse() -> None:
    model = add_adapter(nn.Sequential(nn.Linear(4, 4)), "french")
    before = unchanged_check(model)
    x = torch.randn(2, 4)
    with pytest.raises(AdapterStateError, match=r"No adapter 'frensh'.*Did you mean 'french'"):
        adapters_per_row(model, ["frensh", None]).__enter__()
    with (
        adapters_per_row(model, ["french"]),
        pytest.raises(AdapterStateError, match=r"each of 1 rows, but a Linear .* \(2, 4\)"),
    ):
        model(x)
    with disable_adapter(model), pytest.raises(AdapterStateError, match="disabled at present"):
        adapters_per_row(model, ["french", None]).__enter__()
    before()
    merge_adapter(model)
    with pytest.raises(AdapterStateError, match="merged into the base, which every row"):
        adapters_per_row(model, ["french", None]).__enter__()
    unmerge_adapter(model)
    before()
    biased = add_adapter(nn.Sequential(nn.Linear(4, 4)), "a", bias="lora_only")
    add_adapter(biased, "b")
    for rows in (["a", "b"], ["b", None]):
        with pytest.raises(AdapterStateError, match=r"'a' trains '0.bias' of the base itself"):
            adapters_per_row(biased, rows).__enter__()
    set_adapter(biased, "b")  # then the bias is the base's own
    with adapters_per_row(biased, ["b", None]):
        biased(x)


def test_rows_nest_and_end_with_an_error() -> None:
    model = add_adapter(nn.Sequential(nn.Linear(4, 4)).double(), "a")
    add_adapter(model, "b")
    set_adapter(model, ["a", "b"])
    x = torch.randn(2, 4, dtype=torch.float64)
    plain = model(x)
    before = unchanged_check(model)
    with adapters_per_row(model, ["a", None]):
        outer = model(x)
        with adapters_per_row(model, ["b", "b"]):
            assert not torch.allclose(model(x), outer)
        with pytest.raises(ZeroDivisionError), adapters_per_row(model, ["b", "b"]):
            1 / 0
        assert bit_equal(model(x), outer)
        with disable_adapter(model):
            assert bit_equal(model(x), model[0].base_forward(x))
        assert bit_equal(model(x), outer)
    before()
    assert bit_equal(model(x), plain)


def test_nothing_is_changed_inside_rows() -> None:
    model = add_adapter(nn.Sequential(nn.Linear(4, 4)), "a")
    add_adapter(model, "b")
    with adapters_per_row(model, ["a", None]):
        for action in (
            lambda: set_adapter(model, "b"),
            lambda: merge_adapter(model),
            lambda: delete_adapter(model, "a"),
            lambda: inject_adapter(model, LoraConfig(r=1), "c"),
        ):
            with pytest.raises(AdapterStateError, match="leave `with adapters_per_row"):
                action()


def test_a_batch_without_rows() -> None:
    model = add_adapter(nn.Sequential(nn.Linear(4, 3)), "a")
    with adapters_per_row(model, []):
        assert model(torch.randn(0, 4)).shape == (0, 3)
