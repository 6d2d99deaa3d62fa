"""CONTRIBUTING's new kind of layer carries every type of adapter for Linears, merges and saves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning import (
    LoraConfig,
    OftConfig,
    adapter_state_dict,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.errors import TargetError
from lora_lightning.layers.registry import LAYER_TYPES
from tests.helpers.markdown import recipe
from tests.helpers.tensors import bit_equal, randomize


@pytest.fixture
def example() -> Iterator[dict[str, Any]]:
    before = list(LAYER_TYPES)
    names: dict[str, Any] = {}
    exec(recipe("## A new kind of layer"), names)
    yield names
    LAYER_TYPES[:] = before


def test_it_runs_merges_mixes_and_saves(example: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(example["Projection"](6, 4)).double()
    model = copy.deepcopy(base)
    x = torch.randn(3, 6, dtype=torch.float64)
    inject_adapter(model, LoraConfig(r=2, target_modules=["0"]), "lora")
    assert bit_equal(model(x), base(x))
    inject_adapter(model, OftConfig(oft_block_size=3, target_modules=["0"]), "turn")
    set_adapter(model, ["lora", "turn"])
    randomize([p for p in model.parameters() if p.requires_grad], 0.3)
    lora = adapter_state_dict(model, "lora")
    set_adapter(model, "lora")
    expected = x @ (base[0].weight + 4 * (lora["0.lora_B"] @ lora["0.lora_A"]).t())
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    set_adapter(model, ["lora", "turn"])
    both = model(x)
    assert not torch.allclose(both, expected)
    merge_adapter(model)
    torch.testing.assert_close(model(x), both, rtol=1e-12, atol=1e-12)
    assert bit_equal(model[0].kept_tensors()["weight"], base[0].weight)
    unmerge_adapter(model)
    assert bit_equal(model[0].weight, base[0].weight)
    save_adapter(model, tmp_path, ["lora", "turn"])
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    set_adapter(again, ["lora", "turn"])
    assert bit_equal(again(x), both)
    assert type(unload(model)[0]) is example["Projection"]


def test_without_the_entry_it_is_refused(example: dict[str, Any]) -> None:
    LAYER_TYPES.pop()
    with pytest.raises(TargetError, match="Projection"):
        inject_adapter(
            nn.Sequential(example["Projection"](6, 4)), LoraConfig(r=2, target_modules=["0"])
        )
