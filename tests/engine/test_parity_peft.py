"""Same numbers as peft on every layer and option: outputs, gradients, merges, training, init."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from lora_lightning import (
    LoraConfig,
    adapter_state_dict,
    disable_adapter,
    inject_adapter,
    load_adapter_state_dict,
    merge_adapter,
    set_adapter,
    unload,
)
from lora_lightning.layers.traversal import named_parameters
from tests.helpers.tensors import assert_close_state, bit_equal, randomize, trainable
from tests.helpers.torch_models import CLASSES, LAYERS, OneLayerNet, example_input

# Added to r=4, lora_alpha=6, target_modules=["proj"]; the same words for both libraries.
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.0.proj": 3, "proj": 2},
        "alpha_pattern": {r"layers\.\d\.proj": 5, "1.proj": 7},
    },
    "rank-1": {"r": 1},
    "init-false": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.4},
    "bias-lora_only": {"bias": "lora_only"},
    "bias-all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "one-layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "layers-of": {"layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    "exclude": {"exclude_modules": ["layers.0.proj"]},
    "regex": {"target_modules": r".*\.1\.proj"},
    "with-head": {"target_modules": ["proj", "head"], "rank_pattern": {"head": 3}},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def pair(layer: str, dtype: torch.dtype = torch.float64, **options):
    """The same net twice, adapted by peft and by us, with the same random adapter values."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["proj"], **options}
    base = OneLayerNet(layer).to(dtype)
    theirs = peft_model(copy.deepcopy(base), options)
    ours = copy.deepcopy(base)
    inject_adapter(ours, LoraConfig(**options))
    copy_weights(theirs, ours)
    return base, theirs, ours


def peft_model(base: nn.Module, options: dict) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out for every Conv1D
        return peft.get_peft_model(base, peft.LoraConfig(**options))


def copy_weights(theirs: peft.PeftModel, ours: nn.Module, name: str = "default") -> None:
    biases = {"lora_only", "all"} & {theirs.peft_config[name].bias}
    randomize(
        parameter
        for key, parameter in theirs.named_parameters()
        if f".{name}" in key or (biases and parameter.requires_grad)
    )
    state = peft.get_peft_model_state_dict(theirs, adapter_name=name, save_embedding_layers=False)
    load_adapter_state_dict(ours, {short(key): value for key, value in state.items()}, name)


def short(key: str, name: str = "default") -> str:
    """A parameter's name without what peft or we put into it: `layers.0.proj.lora_A`."""
    key = key.removeprefix("base_model.model.").replace(".base_layer", "")
    key = key.replace(f".modules_to_save.{name}", "").replace(f".adapters.{name}", "")
    key = key.replace(".module.", ".") if key.startswith("head.") else key
    if ".lora_" in key:
        key = key.replace(f".{name}", "").removesuffix(".weight")
    return key


def run(model: nn.Module, x: torch.Tensor):
    """Output, and gradient of every trainable tensor by its short name."""
    model.zero_grad()
    torch.manual_seed(5)  # the same dropout masks
    y = model(x)
    torch.nn.functional.cross_entropy(
        y.reshape(-1, CLASSES), torch.arange(20) % CLASSES, reduction="sum"
    ).backward()
    return y.detach(), {short(name): p.grad for name, p in trainable(model).items()}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        short(key): p.detach()
        for key, p in named_parameters(model)
        if not any(part in key for part in ("lora_", "modules_to_save", "adapters", "original_"))
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_gradients_merged_weights_and_base(layer, options, dtype):
    base, theirs, ours = pair(layer, dtype, **options)
    x = example_input(layer, dtype)
    before = base(x)
    tolerance = TOLERANCE[dtype]

    y_theirs, grads_theirs = run(theirs, x)
    y_ours, grads_ours = run(ours, x)
    assert (y_ours - before).abs().max() > 1e-3  # the adapter does something
    torch.testing.assert_close(y_ours, y_theirs, rtol=tolerance, atol=tolerance)
    assert grads_ours
    assert any(grad.abs().max() > 1e-3 for grad in grads_ours.values())
    assert_close_state(grads_theirs, grads_ours, tolerance)

    with disable_adapter(ours):
        assert bit_equal(ours(x), before)
    if options.get("bias", "none") == "none":  # peft trains biases in place and cannot go back
        with theirs.disable_adapter():
            torch.testing.assert_close(theirs(x), before, rtol=tolerance, atol=tolerance)

    theirs.eval().merge_adapter()
    ours.eval()
    unmerged = ours(x)
    merge_adapter(ours)
    if "modules_to_save" not in options:  # a copy stands beside the base, it is not in it
        assert_close_state(base_weights(theirs), base_weights(ours), tolerance)
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours(x), unmerged, rtol=10 * tolerance, atol=10 * tolerance)

    unload(ours)
    for (name, restored), original in zip(
        ours.state_dict().items(), base.state_dict().values(), strict=True
    ):
        assert bit_equal(restored, original), name


def test_this_comparison_can_fail():
    """The negative control: a scaling that is off by one part in a million is noticed."""
    _, theirs, ours = pair("linear")
    ours.layers[0].proj.adapters["default"].scaling *= 1 + 1e-6
    x = example_input("linear", torch.float64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_several_adapters(layer, active):
    _, theirs, ours = pair(layer)
    second = {"r": 2, "lora_alpha": 3, "target_modules": ["1.proj", "head"], "use_rslora": True}
    theirs.add_adapter("second", peft.LoraConfig(**second))
    inject_adapter(ours, LoraConfig(**second), "second")
    x = example_input(layer, torch.float64)
    copy_weights(theirs, ours, "second")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)  # second is inactive

    theirs.base_model.set_adapter(active)
    set_adapter(ours, active)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    for name in ["default", "second"]:
        grads = [
            {short(key, name): p.grad for key, p in trainable(model).items() if name in key}
            for model in (theirs, ours)
        ]
        assert bool(grads[1]) == (name in active)
        assert_close_state(*grads, 1e-10)

    theirs.merge_adapter()
    merge_adapter(ours)
    assert_close_state(base_weights(theirs), base_weights(ours), 1e-10)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("option", ["plain", "rslora", "patterns", "bias-all", "modules_to_save"])
def test_five_steps_of_adamw_take_the_same_path(layer, option):
    _, theirs, ours = pair(layer, **OPTIONS[option])
    x = example_input(layer, torch.float64)
    optimizers = [
        (model, torch.optim.AdamW(trainable(model).values(), lr=0.01)) for model in (theirs, ours)
    ]
    start = {name: p.detach().clone() for name, p in trainable(ours).items()}
    for _ in range(5):
        for model, optimizer in optimizers:
            run(model, x)
            optimizer.step()
        states = [
            {short(name): p.detach() for name, p in trainable(model).items()}
            for model in (theirs, ours)
        ]
        assert_close_state(*states, 1e-9)
    moved = [(p - start[name]).abs().max() for name, p in trainable(ours).items()]
    assert max(moved) > 0.01


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_start_values_are_distributed_as_in_peft(layer, init):
    """Bound, mean and spread of 8,000 values and more; 0.05 is over four standard errors."""
    wide = nn.Sequential(nn.Linear(400, 600) if layer == "linear" else nn.Embedding(600, 400))
    options = {"r": 20, "target_modules": ["0"], "init_lora_weights": init}
    theirs = peft_model(copy.deepcopy(wide), options)
    inject_adapter(wide, LoraConfig(**options))
    expected = {short(key): value for key, value in peft.get_peft_model_state_dict(theirs).items()}
    found = adapter_state_dict(wide)
    assert expected.keys() - {"0.weight", "0.base_layer.weight"} == found.keys()
    for name, value in found.items():
        std, largest = value.std().item(), value.abs().max().item()
        expected_std, expected_largest = (
            expected[name].std().item(),
            expected[name].abs().max().item(),
        )
        assert std == pytest.approx(expected_std, rel=0.05), name
        assert value.mean().abs() <= 0.05 * std
        # Normal values reach beyond 3 standard deviations, uniform ones end at sqrt(3) of them.
        assert (largest > 2.5 * std) == (expected_largest > 2.5 * expected_std), name
    if layer == "linear" and init is True:
        assert found["0.lora_A"].abs().max().item() == pytest.approx(400**-0.5, rel=0.01)
    if layer == "linear" and init == "gaussian":
        assert found["0.lora_A"].std().item() == pytest.approx(1 / 20, rel=0.05)


def test_linear_against_the_formula():
    """W x + b + (alpha / r) B A x in float64, peft aside."""
    base, _, ours = pair("linear", r=3, lora_alpha=7)
    x = example_input("linear", torch.float64)
    proj = ours.layers[1].proj
    a, b = proj.adapters["default"].lora_A, proj.adapters["default"].lora_B
    weight = base.layers[1].proj.weight + 7 / 3 * b @ a
    expected = x @ weight.T + base.layers[1].proj.bias
    torch.testing.assert_close(proj(x), expected, rtol=1e-12, atol=1e-12)
