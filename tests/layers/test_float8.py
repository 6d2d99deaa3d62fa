"""Weights in float8, whose values are no weights without scales that lie beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.big_modeling import attach_layerwise_casting_hooks
from torch import nn

from lora_lightning import (
    AdapterStateError,
    LoraConfig,
    LoraError,
    TargetError,
    inject_adapter,
    merge_adapter,
)
from lora_lightning.engine.targets.selection import select_modules


class ScaledLinear(nn.Linear):
    """y = (scale * Q) x, as transformers' `FP8Linear` computes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(4, 4, bias=False)
        self.weight = nn.Parameter(self.weight.detach().to(dtype), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.weight_scale_inv).T


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.proj(x))


def float8_linear() -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    return FP8Linear(4, 4, block_size=(2, 2))


def float8_table() -> nn.Module:
    table = nn.Embedding(6, 4)
    table.weight = nn.Parameter(table.weight.detach().to(torch.float8_e5m2), requires_grad=False)
    return table


LAYERS: dict[str, Any] = {
    "e4m3": lambda: ScaledLinear(torch.float8_e4m3fn),
    "e5m2": lambda: ScaledLinear(torch.float8_e5m2),
    "transformers": float8_linear,
    "embedding": float8_table,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "copy": {"target_modules": ["head"], "modules_to_save": ["proj"]},
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float8_is_refused_before_anything_is_touched(build: Any, options: dict[str, Any]) -> None:
    model = Block(build())
    dtype = model.proj.weight.dtype
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TargetError) as caught:
        inject_adapter(model, LoraConfig(r=2, **{"target_modules": ["proj", "head"], **options}))
    option = "modules_to_save" if "modules_to_save" in options else "target_modules"
    assert str(caught.value).startswith(f"'proj' ({type(model.proj).__name__}) holds weights as")
    assert str(dtype) in str(caught.value)
    assert str(caught.value).endswith(f"(lora.{option})")
    assert type(model.head) is nn.Linear
    assert [p.requires_grad for p in model.parameters()] == required
    for name, tensor in model.state_dict().items():
        one, two = (t.reshape(-1).view(torch.uint8) for t in (tensor, before[name]))
        assert torch.equal(one, two), name


def test_what_is_not_in_float8_beside_it_can_be_adapted() -> None:
    model = Block(ScaledLinear(torch.float8_e4m3fn))
    x = torch.randn(3, 4)
    expected = model(x)
    config = LoraConfig(r=2, target_modules=["head"])
    assert [*select_modules(model, config).targets] == ["head"]
    inject_adapter(model, config)
    assert torch.equal(model(x), expected)
    with pytest.raises(LoraError, match="float8_e4m3fn"):
        inject_adapter(model, LoraConfig(r=2, target_modules=["proj"]), "second")
    assert torch.equal(model(x), expected)


def test_integers_that_no_known_quantisation_made_are_refused_alike() -> None:
    with pytest.raises(TargetError, match=r"holds weights as torch.int8.*\(lora.target_modules\)"):
        inject_adapter(Block(ScaledLinear(torch.int8)), LoraConfig(r=2, target_modules=["proj"]))


def test_rows_of_a_float8_table_do_not_train() -> None:
    model = Block(float8_table())
    config = LoraConfig(r=2, target_modules=["head"], trainable_token_indices={"proj": [1]})
    with pytest.raises(TargetError, match=r"float8_e5m2.*\(lora.trainable_token_indices\)"):
        inject_adapter(model, config)


def test_nothing_is_merged_into_what_was_cast_to_float8_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapter(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    attach_layerwise_casting_hooks(
        model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    x = torch.randn(3, 4)
    expected = model(x)
    weight = model[0].weight.detach().clone()
    assert weight.dtype == torch.float8_e4m3fn
    assert model[0].adapters["default"].lora_A.dtype == torch.float32
    with pytest.raises(AdapterStateError, match=r"weight of '0' is held as torch.float8_e4m3fn"):
        merge_adapter(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight.view(torch.uint8), weight.view(torch.uint8))
