"""Bases that were rounded to few bits when they were loaded, dense again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.checkpoint.fingerprint import Fingerprint
from lora_lightning.engine.switching import active_adapters
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.quantized.base import Packed, packed_weight
from lora_lightning.layers.quantized.bitsandbytes import settle_rounding_table
from lora_lightning.layers.traversal import walk


def is_rounded(name: str, base: Fingerprint) -> bool:
    """Tell whether a run had the weight `name` in few bits: its base has scales beside it."""
    path = name.removesuffix(".weight")
    return f"{path}.SCB" in base or f"{name}.absmax" in base


def rounded(weight: Tensor, kind: str) -> Packed:
    """A weight (out, in) rounded as the tasks' `quantize` does it: `nf4`, `fp4` or `int8`."""
    from bitsandbytes.nn import modules as bnb

    out, width = weight.shape
    linear: Any
    if kind == "int8":
        linear = bnb.Linear8bitLt(width, out, bias=False, has_fp16_weights=False)
        linear.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        settle_rounding_table(kind)
        make: Any = bnb.Linear4bit
        linear = make(width, out, bias=False, quant_type=kind)
        linear.weight = bnb.Params4bit(
            weight, requires_grad=False, quant_type=kind, compress_statistics=True, module=linear
        )
    linear.weight = linear.weight.to("cpu")
    packed = packed_weight(linear)
    assert packed is not None
    return packed


def make_dense(network: nn.Module) -> None:
    """Exchange quantised Linears for dense ones in float32, active adapters merged into them."""
    active = active_adapters(network)
    for path, module in [*walk(network)]:
        packed = packed_weight(module)
        if packed is None:
            continue
        merged = module.merged_tensors(active) if isinstance(module, AdaptedLayer) else {}
        weight = merged.get("weight", packed.dense())
        bias = module._parameters.get("bias")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, False)
        if bias is not None:
            linear.bias = nn.Parameter(merged.get("bias", bias.detach()).float(), False)
        network.set_submodule(path, linear)  # type: ignore[no-untyped-call,unused-ignore]


def compute_in_float32(network: nn.Module) -> None:
    """Have quantised layers multiply by their dense weight in float32.

    Those of 8 bits round what they read, too: differently with each input, and with every merge.
    """
    for module in network.modules():
        packed = packed_weight(module)
        if packed is not None:
            name = "base_forward" if isinstance(module, AdaptedLayer) else "forward"
            module.__dict__[name] = partial(_product, module, packed)


def _product(module: Any, packed: Packed, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.linear(x, packed.dense(), module.bias)
