"""AdaLoRA: the adapter, the allocation of ranks, and its drive by LoraCallback alone."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_lightning import (
    adapter_state_dict,
    disable_adapter,
    inject_adapter,
    load_adapter,
    load_adapter_state_dict,
    merge_adapter,
    save_adapter,
)
from lora_lightning.adapters.adalora import AdaLoraConfig
from lora_lightning.engine.rank_allocation import RankAllocator, adalora_adapters, rank_pattern
from lora_lightning.errors import ConfigError, RankError
from tests.helpers.adalora_of_peft import adalora_of_peft, adalora_pair, short_name
from tests.helpers.tensors import assert_close_state, bit_equal, randomize, trainable
from tests.helpers.torch_models import OneLayerNet, example_input


def without_masked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of AdaLoRA adapters, by any names, less those triplets that do not act.

    What is left is an adapter with the `rank_pattern` of the whole one, and computes the same.
    """
    left = dict(state)
    values = {key: tensor for key, tensor in state.items() if key.endswith("lora_E")}
    if not any(tensor.any() for tensor in values.values()):  # none has begun to
        return left
    for key, tensor in values.items():
        prefix, acts = key.removesuffix("lora_E"), (tensor != 0).flatten()
        left[key] = tensor[acts]
        left[prefix + "lora_A"] = state[prefix + "lora_A"][acts]
        left[prefix + "lora_B"] = state[prefix + "lora_B"][:, acts]
    return left


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 5, 2, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.proj(x))


def base_and_input(layer: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    if layer == "conv2d":
        return ConvNet().to(dtype), torch.randn(4, 3, 6, 6, dtype=dtype)
    return OneLayerNet(layer).to(dtype), example_input(layer, dtype)


# -- the adapter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("layer", ["linear", "linear-without-bias", "conv1d", "conv2d"])
def test_same_as_peft(layer: str, dropout: float, dtype: torch.dtype) -> None:
    base, x = base_and_input(layer, dtype)
    before = base(x)
    theirs, ours = adalora_pair(base, lora_dropout=dropout)
    tolerance = TOLERANCE[dtype]
    outputs, grads = [], []
    for model in (theirs, ours):
        torch.manual_seed(5)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        grads.append({short_name(name): p.grad for name, p in trainable(model).items()})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    assert (outputs[1] - before).abs().max() > 1e-2
    assert all(grad.abs().max() > 1e-3 for grad in grads[1].values())
    assert_close_state(*grads, tolerance)
    with disable_adapter(ours):
        assert bit_equal(ours(x), before)
    theirs.eval().merge_adapter()
    unmerged = ours.eval()(x)
    merge_adapter(ours)
    torch.testing.assert_close(ours(x), unmerged, rtol=tolerance, atol=tolerance)
    merged = [
        {
            short_name(k): p
            for k, p in model.named_parameters()
            if "lora_" not in k and "ranknum" not in k
        }
        for model in (theirs, ours)
    ]
    assert_close_state(*merged, tolerance)


def test_starts_as_the_base_with_small_vectors() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 40))
    x = torch.randn(3, 64)
    before = model(x)
    inject_adapter(model, AdaLoraConfig(target_modules=["0", "1"]))
    assert bit_equal(model(x), before)
    adapter = model[0].adapters["default"]
    assert [tuple(p.shape) for p in adapter.parameters()] == [(12, 64), (12, 1), (48, 12)]
    assert not adapter.lora_E.any()
    for name in ("lora_A", "lora_B"):
        assert getattr(adapter, name).std().item() == pytest.approx(0.02, rel=0.1)
    inject_adapter(model, AdaLoraConfig(target_modules=["0"], init_lora_weights=False), "random")
    random = model[0].adapters["random"]
    assert random.lora_A.std().item() == pytest.approx(1, rel=0.1)
    assert random.lora_E.abs().min() > 0


def test_bf16_base_keeps_fp32_adapters() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).bfloat16()
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2))
    randomize(trainable(model).values())
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    adapter = model[0].adapters["default"]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    want = x.double() @ (model[0].weight.double() + adapter.delta_weight().double()).T
    want = want + model[0].bias.double()
    assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x).double(), want, rtol=0.03, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.float()(x.float())
    torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.03)


def test_compiles_once_whatever_the_ranks() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2))
    randomize(trainable(model).values())
    x = torch.randn(3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = compiled(x)
    torch.testing.assert_close(first, model(x))
    allocator = RankAllocator(adalora_adapters(model), AdaLoraConfig(init_r=4, target_r=2), 10)
    model(x).sum().backward()
    allocator.measure()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(8):
            allocator.advance()
            again = compiled(x)
            torch.testing.assert_close(again, model(x))
    assert (again - first).abs().max() > 1e-3
    assert sum(int(mask.sum()) for mask in allocator.masks.values()) < 8


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target_r": 0}, RankError, r"target_r is 0; .*\(lora.target_r\)"),
        ({"init_r": 4}, RankError, r"target_r=8 is more than init_r=4.*\(lora.init_r\)"),
        ({"tinit": -1}, ConfigError, r"tinit is -1; .*at least 0. \(lora.tinit\)"),
        ({"deltaT": 0}, ConfigError, r"deltaT is 0; .*at least 1. \(lora.deltaT\)"),
        ({"beta1": 1.0}, ConfigError, r"beta1 is 1.0; .*\(lora.beta1\)"),
        ({"orth_reg_weight": -0.1}, ConfigError, r"orth_reg_weight is -0.1; .*0 or more"),
        (
            {"total_step": 9, "tinit": 4, "tfinal": 5},
            ConfigError,
            "leave none of 9 optimizer steps",
        ),
        ({"rank_pattern": {"a": [True]}}, RankError, "no list of init_r=12 booleans"),
        ({"init_lora_weights": "pissa"}, ConfigError, "init_lora_weights is 'pissa'"),
        ({"r": 4}, ConfigError, "Unknown AdaLoraConfig option 'r'"),
    ],
)
def test_refusals(options: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        AdaLoraConfig.from_dict(options)


def test_a_rank_beyond_the_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    with pytest.raises(RankError, match=r"init_r=4 is larger than '0'.*at most 3.*\(lora.init_r\)"):
        inject_adapter(model, AdaLoraConfig(init_r=4, target_r=2, target_modules=["0"]))
    assert type(model[0]) is nn.Linear


# -- rank patterns and PEFT's files --------------------------------------------------------------


def finished_pair() -> tuple[peft.PeftModel, nn.Module]:
    theirs, ours = adalora_pair(OneLayerNet("linear").double())
    x = torch.randn(4, 6, dtype=torch.float64)
    allocator = RankAllocator(adalora_adapters(ours), AdaLoraConfig(init_r=4, target_r=2), 15)
    for step in (13, 15):
        for model in (theirs, ours):
            model.zero_grad()
            model(x).square().sum().backward()
        theirs.base_model.update_and_allocate(step)
        allocator.steps = step - 1
        allocator.step()
    return theirs, ours


def test_pattern_and_pruned_tensors_are_those_peft_saves() -> None:
    theirs, ours = finished_pair()
    state = peft.get_peft_model_state_dict(theirs)
    pattern = theirs.peft_config["default"].rank_pattern
    assert rank_pattern(ours) == pattern
    assert sum(map(sum, pattern.values())) == 4
    pruned = without_masked(adapter_state_dict(ours))
    assert_close_state({short_name(key): value for key, value in state.items()}, pruned, 1e-10)

    # What peft saved, here.
    x = torch.randn(4, 6, dtype=torch.float64)
    fresh = OneLayerNet("linear").double()
    fresh.load_state_dict(ours.state_dict(), strict=False)
    options = peft_options(theirs)
    inject_adapter(fresh, AdaLoraConfig.from_file_options(options))
    load_adapter_state_dict(fresh, pruned)
    torch.testing.assert_close(fresh(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert rank_pattern(fresh) == pattern  # also of tensors that have been pruned already

    # What we save, there: as it is, and pruned with the pattern.
    for tensors, ranks in ((adapter_state_dict(ours), None), (pruned, rank_pattern(ours))):
        config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["proj"])
        options = {**config.file_options(), "rank_pattern": ranks}
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            options.pop(key)
        base = OneLayerNet("linear").double()
        base.load_state_dict(ours.state_dict(), strict=False)
        loaded = adalora_of_peft(base, **options)
        named = {f"base_model.model.{key}": value for key, value in tensors.items()}
        peft.set_peft_model_state_dict(loaded, named)
        torch.testing.assert_close(loaded(x), ours(x), rtol=1e-10, atol=1e-10)


def test_folders_both_ways(tmp_path: Path) -> None:
    theirs, ours = finished_pair()
    x = torch.randn(4, 6, dtype=torch.float64)

    def fresh() -> nn.Module:
        base = OneLayerNet("linear").double()
        base.load_state_dict(ours.state_dict(), strict=False)
        return base

    theirs.save_pretrained(tmp_path / "theirs")
    loaded = fresh()
    load_adapter(loaded, tmp_path / "theirs")
    assert rank_pattern(loaded) == rank_pattern(ours)
    torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-10, atol=1e-10)
    for name, model in (("ours", ours), ("again", loaded)):
        save_adapter(model, tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft does not know its own keys of rank_pattern
            there = peft.PeftModel.from_pretrained(fresh(), tmp_path / name)
        torch.testing.assert_close(there(x), ours(x), rtol=1e-10, atol=1e-10)


def peft_options(model: peft.PeftModel) -> dict[str, Any]:
    known = {spec.name for spec in dataclasses.fields(AdaLoraConfig)} | AdaLoraConfig.file_only
    saved = model.peft_config["default"].to_dict()
    return {
        k: list(v) if isinstance(v, set) else v
        for k, v in saved.items()
        if k in known and v is not None
    }


def test_no_pattern_before_anything_was_masked() -> None:
    _, ours = adalora_pair(OneLayerNet("linear").double())
    assert rank_pattern(ours) == {}
    for adapter in adalora_adapters(ours).values():
        nn.init.zeros_(adapter.lora_E)
    assert rank_pattern(ours) == {}
    assert all(len(t) for t in without_masked(adapter_state_dict(ours)).values())
