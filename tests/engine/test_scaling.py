"""scale_adapter: a factor for one adapter, in this run only."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lightning import (
    LoraError,
    delete_adapter,
    disable_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    scale_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.errors import AdapterStateError
from tests.helpers.adapted_models import CLOSE, LAYER_KINDS, LayerAndHead, add_adapter
from tests.helpers.tensors import bit_equal
from tests.helpers.unchanged import unchanged_check


@pytest.mark.parametrize("kind", ["linear", "conv1D", "embedding", "conv2d"])
def test_scaled_weight(kind: str) -> None:
    torch.manual_seed(0)
    model = LayerAndHead(kind).double()
    weight = model.proj.weight.detach().clone()
    add_adapter(model, "a", target_modules=["proj"], lora_alpha=3)
    merge_adapter(model)
    delta = model.proj.weight.detach() - weight
    unmerge_adapter(model)
    x = LAYER_KINDS[kind][1]()
    x = x.double() if x.is_floating_point() else x
    trained = model(x)
    for factor in (0, 0.25, -1, 3.5):
        scale_adapter(model, "a", factor)
        dense = copy.deepcopy(model)
        delete_adapter(dense, "a")
        with torch.no_grad():
            dense.proj.weight.copy_(weight + factor * delta)
        torch.testing.assert_close(model(x), dense(x), **CLOSE)
        merge_adapter(model)
        torch.testing.assert_close(model.proj.weight, dense.proj.weight, **CLOSE)
        unmerge_adapter(model)
    scale_adapter(model, "a", 1)  # of its own config's, not of what it was last
    assert bit_equal(model(x), trained)


def test_scale_is_of_one_adapter_and_of_this_run(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4)).double()
    model = add_adapter(copy.deepcopy(base), "a", lora_bias=True)
    add_adapter(model, "b")
    set_adapter(model, ["a", "b"])
    x = torch.randn(2, 4, dtype=torch.float64)
    with disable_adapter(model):
        plain = model(x)
    set_adapter(model, "a")
    of_a = model(x) - plain
    set_adapter(model, "b")
    of_b = model(x) - plain
    set_adapter(model, ["a", "b"])
    scale_adapter(model, "a", 0.5)
    torch.testing.assert_close(model(x), plain + 0.5 * of_a + of_b, **CLOSE)
    save_adapter(model, tmp_path, "a")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), plain + of_a, **CLOSE)


def test_what_scaling_refuses() -> None:
    model = add_adapter(nn.Sequential(nn.Linear(4, 4)), "alpha")
    before = unchanged_check(model)
    with pytest.raises(AdapterStateError, match="Did you mean 'alpha'"):
        scale_adapter(model, "alfa", 2)
    for factor in (float("nan"), float("inf"), "2", None):
        with pytest.raises(LoraError, match="must be a finite number"):
            scale_adapter(model, "alpha", factor)
    before()
    merge_adapter(model)
    with pytest.raises(AdapterStateError, match="merged into the base"):
        scale_adapter(model, "alpha", 2)
    rows = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    options = {"target_modules": ["1"], "trainable_token_indices": {"0": [1]}}
    add_adapter(rows, "a", **options)
    before = unchanged_check(rows)
    with pytest.raises(AdapterStateError, match="TrainableTokensAdapter, which has no scaling"):
        scale_adapter(rows, "a", 2)
    before()
