"""Where peft 0.21.2 is wrong in silence, this project is right: one test for each known fault.

Numbered as in the list of faults that this project started from. Where it is cheap, the test shows
peft's fault as well, so that it falls as soon as there is nothing to be better at.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_lightning import (
    LoftqConfig,
    LoraConfig,
    LoraError,
    active_adapters,
    adapter_state_dict,
    add_weighted_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora_lightning.layers.traversal import named_parameters
from tests.helpers.tensors import bit_equal, randomize


def adapted(model: nn.Module, name: str = "default", **options) -> nn.Module:
    inject_adapter(model, LoraConfig(**{"r": 2, **options}), name)
    randomize([p for n, p in named_parameters(model) if f".{name}." in n], 0.3)
    return model


def peft_adapted(model: nn.Module, **options) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, **options}))
    randomize([p for n, p in theirs.named_parameters() if ".default" in n], 0.3)
    return theirs


def test_1_the_encoder_layers_fast_path_does_not_bypass_adapters() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    options = {"target_modules": ["linear1", "linear2"]}
    theirs = peft_adapted(copy.deepcopy(layer), **options)
    with torch.no_grad():
        base = layer.eval()(x)
        assert torch.allclose(theirs.eval()(x), base, atol=1e-6)  # peft: no effect in eval
        assert (theirs.train()(x) - base).abs().max() > 0.01
        ours = adapted(layer, **options)
        torch.testing.assert_close(ours.eval()(x), ours.train()(x))
        assert (ours.eval()(x) - base).abs().max() > 0.01


def test_2_attention_never_touches_its_base() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).bfloat16()
    model = nn.ModuleDict({"attn": attention})
    before = {name: p.detach().clone() for name, p in attention.named_parameters()}
    objects = {name: id(p) for name, p in attention.named_parameters()}
    adapted(model, target_modules=["attn"])
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    for _ in range(50):
        attention(x, x, x)
    for name, tensor in before.items():
        assert bit_equal(attention.get_parameter(name), tensor)
        assert id(attention.get_parameter(name)) == objects[name]
    # out_proj alone has an effect, too
    alone = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)})
    x = x.float()
    base = alone["attn"](x, x, x)[0]
    adapted(alone, target_modules=["out_proj"])
    assert (alone["attn"](x, x, x)[0] - base).abs().max() > 0.01


def test_3_a_frozen_adapter_is_frozen_after_disable() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 6)))
    set_adapter(model, "default", trainable=False)
    with disable_adapter(model):
        pass
    assert not any(p.requires_grad for p in model.parameters())
    theirs = peft_adapted(nn.Sequential(nn.Linear(6, 6)), target_modules=["0"])
    theirs.set_adapter("default", inference_mode=True)
    with theirs.disable_adapter():
        pass
    assert any(p.requires_grad for p in theirs.parameters())


def test_4_an_adapter_named_like_a_module(tmp_path: Path) -> None:
    model = nn.ModuleDict({"lin": nn.Linear(6, 6), "exploration_head": nn.Linear(6, 6)})
    adapted(model, target_modules=["lin"])
    adapted(model, "lin", target_modules=["exploration_head"])
    assert list(adapter_state_dict(model)) == ["lin.lora_A", "lin.lora_B"]
    assert list(adapter_state_dict(model, "lin")) == [
        "exploration_head.lora_A",
        "exploration_head.lora_B",
    ]
    save_adapter(model, tmp_path, "lin")
    other = nn.ModuleDict({"lin": nn.Linear(6, 6), "exploration_head": nn.Linear(6, 6)})
    load_adapter(other, tmp_path, "x")
    assert bit_equal(
        adapter_state_dict(other, "x")["exploration_head.lora_A"],
        adapter_state_dict(model, "lin")["exploration_head.lora_A"],
    )


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_5_starts_from_the_base_survive_saving(start: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 9))
    ours = copy.deepcopy(base)
    inject_adapter(ours, LoraConfig(r=2, init_lora_weights=start, target_modules=["0"]))
    randomize([p for p in ours.parameters() if p.requires_grad], 0.3)
    x = torch.randn(4, 12)
    save_adapter(ours, tmp_path)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), ours(x), rtol=1e-5, atol=1e-5)
    # any consumer that adds scaling * B A to the untouched base is right
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    assert bit_equal(ours[0].weight, base[0].weight)


@pytest.mark.parametrize(
    "options",
    [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"padding": "same"}],
    ids=str,
)
def test_6_convolutions_keep_dilation_and_padding_mode(options: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, **options)).double()
    adapted(model, target_modules=["0"])
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    result = model(x)
    merge_adapter(model)
    torch.testing.assert_close(model(x), result, rtol=1e-10, atol=1e-10)


def test_7_weighted_combinations_are_right_with_rslora() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    deltas = {}
    for name, r in (("a", 2), ("b", 3)):
        adapted(model, name, r=r, lora_alpha=5, use_rslora=True)
        state = adapter_state_dict(model, name)
        deltas[name] = 5 / r**0.5 * state["0.lora_B"] @ state["0.lora_A"]
    add_weighted_adapter(model, ["a", "b"], [0.7, -0.2], "both", "cat")
    x = torch.randn(4, 12, dtype=torch.float64)
    weight = model[0].weight + 0.7 * deltas["a"] - 0.2 * deltas["b"]
    set_adapter(model, "both")
    torch.testing.assert_close(model(x), x @ weight.t() + model[0].bias, rtol=1e-10, atol=1e-10)


def test_8_modules_to_save_takes_names_not_endings() -> None:
    def net() -> nn.Module:
        names = ("body", "head", "overhead", "subhead")
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    options = {"target_modules": ["body"], "modules_to_save": ["head"]}
    model = adapted(net(), **options)
    assert {k.split(".")[0] for k in adapter_state_dict(model)} == {"body", "head"}
    theirs = peft.get_peft_model_state_dict(peft_adapted(net(), **options))
    assert any("overhead" in key for key in theirs)


def test_9_max_norm_of_an_embedding_leaves_the_adapter_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6, max_norm=0.5))
    adapted(model, target_modules=["0"])
    before = {k: t.clone() for k, t in adapter_state_dict(model).items()}
    model(torch.arange(9))
    assert all(bit_equal(t, before[k]) for k, t in adapter_state_dict(model).items())
    with pytest.raises(LoraError, match="max_norm"):
        merge_adapter(model)


def test_10_quantised_bases_merge_the_adapters_bias_with_its_scaling() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    model = nn.Sequential(layer.to("cpu"), nn.Linear(64, 4))
    bias = model[0].bias.detach().clone()
    adapted(model, lora_alpha=6, lora_bias=True, target_modules=["0"])
    inject_adapter(model, LoraConfig(r=2, target_modules=["1"]), "elsewhere")  # not on this layer
    set_adapter(model, ["default", "elsewhere"])
    merge_adapter(model)
    expected = bias + 3 * adapter_state_dict(model)["0.lora_B_bias"]
    torch.testing.assert_close(model[0].bias, expected)
    unmerge_adapter(model)
    assert bit_equal(model[0].bias, bias)


@pytest.mark.parametrize("layer", [nn.Embedding(9, 8), nn.Conv1d(8, 8, 3)], ids=["embed", "conv"])
def test_10_loftq_says_where_it_is_not_defined(layer: nn.Module) -> None:
    options = {"init_lora_weights": "loftq", "loftq_config": LoftqConfig(weights="nowhere")}
    with pytest.raises(LoraError, match="is defined for Linear modules"):
        adapted(nn.Sequential(layer), target_modules=["0"], **options)


def test_11_ten_merges_in_bf16_leave_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    weight = model[0].weight.detach().clone()
    adapted(model)
    for _ in range(10):
        merge_adapter(model)
        assert not bit_equal(model[0].weight, weight)
        unmerge_adapter(model)
    assert bit_equal(model[0].weight, weight)


def test_12_tied_weights_are_not_corrupted() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    weight = model["embed"].weight.detach().clone()
    adapted(model, target_modules=["embed", "head"])
    with pytest.raises(LoraError, match="shared with another module"):
        merge_adapter(model)
    assert bit_equal(model["embed"].weight, weight)
    assert model["head"].weight is model["embed"].weight


def test_12b_several_dora_adapters_compose_in_the_order_they_were_added() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    model = nn.Sequential(layer)
    names = ["first", "second"]
    for name in names:
        adapted(model, name, use_dora=True)
    x = torch.randn(3, 6, dtype=torch.float64)

    def composed(base: Tensor) -> Tensor:
        weight = base
        for name in names:
            state = adapter_state_dict(model, name)
            delta = 4 * state["0.lora_B"] @ state["0.lora_A"]  # lora_alpha / r = 8 / 2
            gain = state["0.lora_magnitude_vector"] / (base + delta).norm(dim=1)
            weight = gain[:, None] * (weight + delta)
        return x @ weight.t() + layer.bias

    expected = composed(layer.weight.detach().clone())
    for order in (names, names[::-1]):  # which is active first does not matter
        set_adapter(model, order)
        assert sorted(active_adapters(model)) == names
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
