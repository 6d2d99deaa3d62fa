"""Linears that answer in another shape than (..., out), and parametrized layers that pad alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_lightning import (
    AdapterStateError,
    LohaConfig,
    LoraConfig,
    inject_adapter,
    merge_adapter,
    unload,
)
from lora_lightning.layers.by_weight import AdaptedByWeight
from lora_lightning.layers.conv import AdaptedConv
from tests.helpers.tensors import bit_equal


class OverChannels(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.glu(super().forward(x))


class ByHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (2, -1)).transpose(1, 2)


class Pooled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


@pytest.mark.parametrize("config", [LoraConfig, LohaConfig])
@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (OverChannels, (2, 8, 5, 4)),
        (OverChannels, (2, 8, 6, 8)),  # where the last dimension happens to be `in`
        (Gated, (2, 3, 8)),
        (ByHead, (2, 3, 8)),
        (Pooled, (2, 3, 8)),
    ],
)
def test_other_shapes(cls: Any, shape: tuple[int, ...], config: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": cls(8, 8)})
    x = torch.randn(shape)
    before = model["layer"](x)
    inject_adapter(model, config(r=2, target_modules=["layer"]))
    layer = model["layer"]
    assert isinstance(layer, AdaptedByWeight)
    assert bit_equal(layer(x), before)
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.normal_(0, 0.3)
    y = layer(x)
    formula = copy.deepcopy(model)
    unload(formula)
    with torch.no_grad():
        formula["layer"].weight += layer.adapters["default"].delta_weight()
    torch.testing.assert_close(y, formula["layer"](x))
    y.sum().backward()
    assert all(p.grad is not None for p in layer.adapters.parameters())
    merge_adapter(model)
    assert bit_equal(layer(x), y)
    unload(model)
    assert type(layer) is cls
    assert bit_equal(layer(x), before)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_parametrized_kernels_with_own_padding(norm: str) -> None:
    torch.manual_seed(0)
    layer = getattr(parametrizations, norm)(Causal(4, 6, 3))
    model = nn.ModuleDict({"layer": layer})
    x = torch.randn(2, 4, 9)
    before = layer.eval()(x)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = getattr(parametrizations, norm)(Causal(4, 6, 3))
    inject_adapter(model.train(), LoraConfig(r=2, target_modules=["layer"]))
    assert all(bit_equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert isinstance(layer, AdaptedConv)
    assert not isinstance(layer, AdaptedByWeight)
    layer.eval()
    assert bit_equal(layer(x), before)
    adapter = layer.adapters["default"]
    nn.init.normal_(adapter.lora_B, 0, 0.3)
    padded = F.pad(x, (2, 0))
    update = F.conv1d(F.conv1d(padded, adapter.lora_A), adapter.lora_B) * adapter.scaling
    torch.testing.assert_close(layer(x), before + update)
    with pytest.raises(AdapterStateError, match="parametrization"):
        merge_adapter(model)
    with pytest.raises(AttributeError):  # the class of the layer is not torch's to change
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x), before + update)
    unload(model)
    assert bit_equal(layer(x), before)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is Causal
    assert parametrize.is_parametrized(other)
    torch.testing.assert_close(layer(x), before)
