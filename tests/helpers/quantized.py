"""Quantised layers: what their base consists of, and equality bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def parts(layer: Any) -> dict[str, Tensor]:
    """Copies of everything that the base consists of, as plain tensors."""
    found: dict[str, Tensor] = {}
    for name, value in layer.state_dict().items():
        if "adapters" in name:
            continue
        if hasattr(value, "qdata"):
            found |= {f"{name}.{n}": getattr(value, n) for n in value.__tensor_flatten__()[0]}
        else:
            found[name] = value
    return {name: value.clone() for name, value in found.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Also where packed values, read as floating point, happen to be NaN."""
    return one.dtype == other.dtype and torch.equal(
        *(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    )


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


def loaded(folder: str, method: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    quantisation = {
        "nf4": lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False)),
    }[method]()
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, dtype=torch.bfloat16, device_map="cpu"
    )
