"""torch.compile: one graph for every adapter type; switching, disabling, rescaling keep it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lora_lightning
from lora_lightning import (
    LoraConfig,
    adapters_per_row,
    disable_adapter,
    inject_adapter,
    scale_adapter,
    set_adapter,
)
from lora_lightning.adapters.base import DeltaAdapter
from lora_lightning.engine.injection import adapters_named
from lora_lightning.layers.traversal import named_parameters
from tests.helpers.adapter_types import TYPES
from tests.helpers.tensors import bit_equal, randomize


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": nn.Linear(6, 8), "out": nn.Linear(8, 6)}).eval()
    model.forward = lambda x: model["out"](torch.tanh(model["proj"](x)))
    config = getattr(lora_lightning, TYPES[name][0])(
        **{**TYPES[name][1], "target_modules": ["proj", "out"]}
    )
    inject_adapter(model, config, "one")
    inject_adapter(model, LoraConfig(r=2, target_modules=["proj"]), "two")
    randomize([p for n, p in named_parameters(model) if ".adapters." in n], 0.3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_one_graph_for_all_states(name: str) -> None:
    model, backend, x = net(name), CompileCounter(), torch.randn(4, 6)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    seen = []
    for names in ("one", "two", ["one", "two"], [], "one"):
        set_adapter(model, names, trainable=False)
        seen.append(model(x))
        torch.testing.assert_close(compiled(x), seen[-1])
    with disable_adapter(model):
        assert bit_equal(compiled(x), seen[3])
    if all(isinstance(a, DeltaAdapter) for a in adapters_named(model, "one").values()):
        scale_adapter(model, "one", 0.25)
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.allclose(compiled(x), seen[0])
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[3])
    assert backend.frame_count == 1


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        "dora",
        *(pytest.param(n, marks=pytest.mark.slow) for n in TYPES if n not in ("lora", "dora")),
    ],
)
def test_gradients_through_the_graph(name: str) -> None:
    model, x = net(name), torch.randn(4, 6)
    set_adapter(model, "one")
    trained = {n: p for n, p in named_parameters(model) if p.requires_grad}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        results.append({n: p.grad.clone() for n, p in trained.items()})
    assert results[0].keys() == results[1].keys()
    for key, gradient in results[0].items():
        torch.testing.assert_close(results[1][key], gradient)


def test_the_test_can_fail() -> None:
    """A scaling read as a number is compiled in: rescaling then costs a second graph."""
    model, backend, x = net("lora"), CompileCounter(), torch.randn(4, 6)
    set_adapter(model, "one", trainable=False)
    for adapter in adapters_named(model, "one").values():
        adapter.scale = lambda adapter=adapter: adapter.scaling
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x)
    scale_adapter(model, "one", 0.25)
    compiled(x)
    assert backend.frame_count > 1


def test_rows_of_adapters_that_are_not_active() -> None:
    model, x = net("lora"), torch.randn(3, 6)
    with adapters_per_row(model, ["two", "one", None]):
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled, expected)
    set_adapter(model, [])
    assert not torch.allclose(compiled[:2], model(x)[:2])
