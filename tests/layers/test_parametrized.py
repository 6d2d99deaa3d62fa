"""Weights that parametrizations compute: reading them leaves no trace, a forward reads them once."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils as nn_utils
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_lightning import (
    AdapterStateError,
    IA3Config,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    OftConfig,
    ShiraConfig,
    VeraConfig,
    adapter_status,
    add_weighted_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unload,
)
from lora_lightning.checkpoint.fingerprint import base_fingerprint
from lora_lightning.layers.multihead_attention import AdaptedMultiheadAttention
from lora_lightning.layers.parametrized import value


class Restless(nn.Module):
    """Changes all that it can reach at every reading, in train and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("readings", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))
        self.count = 0
        self.history: list[float] = []

    readings: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            self.readings += 1
            self.scale.mul_(1.25)
        self.count += 1
        self.history.append(self.scale.item())
        drawn = float(torch.rand(())) + random.random() + float(np.random.rand())
        return weight * self.scale + 0.01 * drawn


def restless(module: nn.Module, name: str = "weight") -> nn.Module:
    return parametrize.register_parametrization(module, name, Restless())


def spectral(module: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(module)


def by_hook(module: nn.Module) -> nn.Module:
    return nn_utils.spectral_norm(module)


NORMS = {"restless": restless, "spectral": spectral, "spectral by a hook": by_hook}


def network(norm: Callable[[nn.Module], nn.Module] = restless) -> nn.Sequential:
    torch.manual_seed(0)
    parts = {"first": norm(nn.Linear(6, 8)), "act": nn.ReLU(), "last": nn.Linear(8, 4)}
    return nn.Sequential(OrderedDict(parts))


def everything(model: nn.Module) -> Iterator[Any]:
    """All that a reading could change: tensors, other state, generators."""
    for module in model.modules():
        yield from (tensor.clone() for tensor in module._parameters.values() if tensor is not None)
        yield from (buffer.clone() for buffer in module._buffers.values() if buffer is not None)
        if isinstance(module, Restless):
            yield module.count, list(module.history)
    yield torch.get_rng_state()
    yield random.getstate()
    yield np.random.get_state()[1].tolist()


def same(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, two, strict=True)
    )


TARGETS: dict[str, Any] = {"target_modules": ["first", "last"]}
TYPES = {
    "lora": LoraConfig(r=2, **TARGETS),
    "dora": LoraConfig(r=2, use_dora=True, **TARGETS),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", **TARGETS),
    "lora_bias": LoraConfig(r=2, lora_bias=True, **TARGETS),
    "loha": LohaConfig(r=2, **TARGETS),
    "lokr": LokrConfig(r=2, **TARGETS),
    "oft": OftConfig(oft_block_size=2, r=0, **TARGETS),
    "ia3": IA3Config(feedforward_modules=["last"], **TARGETS),
    "shira": ShiraConfig(r=2, **TARGETS),
    "vera": VeraConfig(r=2, **TARGETS),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("config", TYPES.values(), ids=TYPES)
def test_all_but_a_forward_leaves_no_trace(config: Any, norm: Any, tmp_path: Path) -> None:
    model = network(norm).train()
    own = list(everything(model))
    inject_adapter(model, config, seed=3)
    fingerprint = base_fingerprint(model)
    str(adapter_status(model))
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "second")
    set_adapter(model, ["default", "second"])
    if config is TYPES["lora"]:
        add_weighted_adapter(model, ["default", "second"], [0.5, 0.5], "mean")
    with disable_adapter(model):
        pass
    assert base_fingerprint(model) == fingerprint
    unload(model)
    assert same(list(everything(model)), own)


def run(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The output of a forward that draws what every other such forward draws."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    output: Any = model(*inputs)
    return output[0] if isinstance(output, tuple) else output


# Whose start is no no-op bit for bit, or was computed from a weight that moves.
_NEAR = ("oft", "pissa", "shira", "vera", "dora")


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("name", TYPES)
def test_a_forward_moves_the_base_as_it_does_without_adapters(name: str, norm: Any) -> None:
    x = torch.randn(5, 6)
    plain, model = network(norm), network(norm)
    inject_adapter(model, TYPES[name], seed=3)
    for training in (True, False, True):
        plain.train(training)
        model.train(training)
        for _ in range(3):
            expected, found = run(plain, x), run(model, x)
            assert name in _NEAR or torch.equal(found, expected)
    same_base(model, plain)


def same_base(model: nn.Module, plain: nn.Module) -> None:
    found = model.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layer", ["conv", "embedding"])
def test_other_kinds_of_layers_too(layer: str) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        kinds = {"conv": nn.Conv1d(2, 4, 3), "embedding": nn.Embedding(6, 4)}
        return nn.Sequential(OrderedDict(only=restless(kinds[layer])))

    x = torch.randn(1, 2, 8) if layer == "conv" else torch.tensor([1, 2, 5])
    plain, model = build(), build()
    inject_adapter(model, LoraConfig(r=2, use_dora=True, target_modules=["only"]), seed=1)
    same_base(model, plain)
    expected, _ = run(plain, x), run(model, x)
    same_base(model, plain)
    inner, outer = (m.only.parametrizations.weight[0].count for m in (plain, model))
    assert inner == outer
    unload(model)
    assert torch.equal(run(model, x), run(plain, x))
    assert not torch.equal(run(plain, x), expected)  # it does move


def test_an_attention_with_parametrized_projections() -> None:
    def build() -> nn.ModuleDict:
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        restless(attention, "in_proj_weight")
        restless(attention, "in_proj_bias")
        return nn.ModuleDict({"attention": attention})

    x = torch.randn(2, 3, 8)
    plain, model = build(), build()
    inject_adapter(model, LoraConfig(r=2, target_modules=["attention"]), seed=1)
    assert isinstance(model["attention"], AdaptedMultiheadAttention)
    base_fingerprint(model)
    same_base(model, plain)
    inputs = (x, x, x * 2)
    torch.testing.assert_close(run(model["attention"], *inputs), run(plain["attention"], *inputs))


def test_one_compiled_forward_moves_the_base_once() -> None:
    plain, model = network(spectral).train(), network(spectral).train()
    inject_adapter(model, LoraConfig(r=2, use_dora=True, target_modules=["first"]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(5, 6)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), plain(x))
    same_base(model, plain)


def test_the_value_that_is_read_is_the_one_that_eval_mode_computes_with() -> None:
    model = network(spectral).train()
    model(torch.randn(5, 6))
    found = value(model.first, "weight")
    assert torch.equal(found, model.eval().first.weight)
    assert value(model.first, "bias") is model.first.bias
    assert value(model.first, "none") is None


def test_the_way_out_of_a_merge_that_is_refused(tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(fc=parametrizations.weight_norm(nn.Linear(6, 5))))

    x, model, plain = torch.randn(3, 6), made(), made()
    inject_adapter(model, LoraConfig(r=2, target_modules=["fc"]))
    nn.init.normal_(model.fc.adapters["default"].lora_B)
    with pytest.raises(AdapterStateError, match="save it, and load it onto a model whose"):
        merge_adapter(model)
    save_adapter(model, tmp_path)
    parametrize.remove_parametrizations(plain.fc, "weight")
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(merge_and_unload(plain)(x), model(x))


def test_a_name_that_a_parametrization_has_as_well_selects_the_layer() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 2))
    inject_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    assert [layer.path for layer in adapter_status(model).layers] == ["0"]
