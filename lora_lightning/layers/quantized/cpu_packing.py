"""Keep bitsandbytes from packing 4-bit weights for CPU inference while a model carries adapters.

On a CPU with AVX512-BF16 the first forward of a `Linear4bit` in eval mode packs its weight anew,
for a product through which no gradient goes: after one validation batch, training on would leave
everything below that layer without gradients. It also rounds the scales of the base to bfloat16,
and fails where the sizes are no multiples of 32 and 64. (bitsandbytes 0.50.2, `Linear4bit.forward`
and `matmul_4bit`.) Layers without adapters stand in the way of gradients too, so all are seen to.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.quantized.bitsandbytes import Packed4bit, is_linear4bit

_SWITCH = "support_avx512bf16_for_cpu"
_KEPT = "_cpu_packing_before_adapters"


def close_cpu_packing(model: nn.Module) -> None:
    """Make every Linear4bit of a model with layers use the one layout that can be trained."""
    if not any(isinstance(module, AdaptedLayer) for module in model.modules()):
        return
    for module in _layers(model):
        if _KEPT not in module.__dict__:
            module.__dict__[_KEPT] = getattr(module, _SWITCH, False)
            setattr(module, _SWITCH, False)
            Packed4bit.of(module)  # which unpacks it


def reopen_cpu_packing(model: nn.Module) -> None:
    """Undo `close_cpu_packing`; the layout changes at the next forward in eval mode."""
    for module in _layers(model):
        if _KEPT in module.__dict__:
            setattr(module, _SWITCH, module.__dict__.pop(_KEPT))


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_linear4bit(module)]
