"""Trained copies (`modules_to_save`) on a base in 16 bits: fp32 masters, maths as the base's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning import (
    LoraConfig,
    OftConfig,
    inject_adapter,
    merge_and_unload,
    set_adapter,
    unload,
)
from lora_lightning.adapters.modules_to_save import ModulesToSaveCopy
from tests.helpers.tensors import bit_equal, randomize

HALF = [torch.bfloat16, torch.float16]


def copy_in(module: nn.Module) -> ModulesToSaveCopy:
    (found,) = [m for m in module.modules() if isinstance(m, ModulesToSaveCopy)]
    return found


def adapted(base: nn.Module, name: str = "0") -> nn.Module:
    model = copy.deepcopy(base)
    inject_adapter(model, LoraConfig(r=2, target_modules=["1"], modules_to_save=[name]))
    return model


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cast_first", [True, False])
def test_it_starts_as_the_base_and_trains_in_fp32(dtype: torch.dtype, cast_first: bool) -> None:
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    base = copy.deepcopy(plain).to(dtype)
    model = adapted(base) if cast_first else adapted(plain).to(dtype)
    x = torch.randn(3, 6, dtype=dtype)
    assert bit_equal(model(x), base(x))
    trained = copy_in(model)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    if not cast_first:  # what training starts from is not rounded
        assert bit_equal(trained.module.weight, plain[0].weight)
    model(x).sum().backward()
    assert trained.module.weight.grad.dtype == torch.float32

    with torch.no_grad():
        trained.module.weight += 1e-5  # lost in 16 bits, and kept here
    assert not bit_equal(trained.module.weight, trained.module.weight.to(dtype).float())
    expected = nn.functional.linear(
        x, trained.module.weight.to(dtype), trained.module.bias.to(dtype)
    )
    assert bit_equal(model[0](x), expected)
    merged = merge_and_unload(copy.deepcopy(model))
    assert bit_equal(merged[0](x), expected)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert bit_equal(unload(model)(x), base(x))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_without_master_copies_when_asked(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    config = LoraConfig(r=2, target_modules=["1"], modules_to_save=["0"])
    inject_adapter(model, config, autocast_adapter_dtype=False)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_other_adapters_on_top_of_it() -> None:
    layers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)])
    base, wide = copy.deepcopy(layers).to(torch.bfloat16), layers
    for model in (base, wide):
        inject_adapter(model, LoraConfig(r=2, target_modules=["1"], modules_to_save=["0"]), "whole")
        inject_adapter(model, LoraConfig(r=2, target_modules=["0"]), "lora")
        inject_adapter(model, OftConfig(oft_block_size=2, target_modules=["0"]), "oft")
        set_adapter(model, ["whole", "lora", "oft"])
        torch.manual_seed(0)
        randomize([p for p in model.parameters() if p.requires_grad], 0.1)
    x = torch.randn(2, 3, 8)
    narrow: Any = base[0](x.to(torch.bfloat16), x.to(torch.bfloat16), x.to(torch.bfloat16))[0]
    assert narrow.dtype == torch.bfloat16
    # bf16 has 8 bits, and several products follow each other
    torch.testing.assert_close(narrow.float(), wide[0](x, x, x)[0], rtol=0.05, atol=0.05)


def test_it_compiles_to_one_graph() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(torch.bfloat16))
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert copy_in(model).module.weight.grad.dtype == torch.float32


def test_tied_parameters_inside_of_it() -> None:
    block = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    block[1].weight = block[0].weight
    base = nn.Sequential(block, nn.Linear(6, 4)).to(torch.bfloat16)
    model = adapted(base)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert bit_equal(model(x), base(x))
    model(x).sum().backward()
    assert model[0][0].weight is model[0][1].weight
    assert model[0][0].weight.grad is not None
