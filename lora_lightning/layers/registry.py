"""Module kinds that can carry adapters, one file each."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.conv import (
    CONVOLUTIONS,
    AdaptedConv,
    AdaptedConvByWeight,
    is_conv_by_weight,
)
from lora_lightning.layers.conv1d import AdaptedConv1D, is_conv1d
from lora_lightning.layers.embedding import (
    AdaptedEmbedding,
    AdaptedEmbeddingByWeight,
    is_embedding_by_weight,
)
from lora_lightning.layers.linear import (
    AdaptedLinear,
    AdaptedLinearByWeight,
    is_linear_by_weight,
)
from lora_lightning.layers.multihead_attention import AdaptedMultiheadAttention, attention_obstacle
from lora_lightning.layers.quantized.base import AdaptedBitsandbytesLinear, AdaptedQuantizedLinear
from lora_lightning.layers.quantized.bitsandbytes import is_linear4bit, is_linear8bit
from lora_lightning.layers.quantized.torchao import is_torchao_linear

SUPPORTED = "Linear, Conv1D (transformers), Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention"


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and not getattr(module, "transposed", False)


# Each layer class with a test of the modules that it fits; the first that fits is taken.
LAYER_TYPES: list[tuple[Callable[[nn.Module], bool], type[AdaptedLayer]]] = [
    (lambda m: is_linear4bit(m) or is_linear8bit(m), AdaptedBitsandbytesLinear),
    (is_torchao_linear, AdaptedQuantizedLinear),
    (lambda m: isinstance(m, nn.Linear) and is_linear_by_weight(m), AdaptedLinearByWeight),
    (lambda m: isinstance(m, nn.Linear), AdaptedLinear),
    (
        lambda m: isinstance(m, nn.MultiheadAttention) and attention_obstacle(m) is None,
        AdaptedMultiheadAttention,
    ),
    (lambda m: isinstance(m, nn.Embedding) and is_embedding_by_weight(m), AdaptedEmbeddingByWeight),
    (lambda m: isinstance(m, nn.Embedding), AdaptedEmbedding),
    (lambda m: _is_conv(m) and is_conv_by_weight(m), AdaptedConvByWeight),
    (lambda m: _is_conv(m), AdaptedConv),
    (is_conv1d, AdaptedConv1D),
]


def layer_type_for(module: nn.Module) -> type[AdaptedLayer] | None:
    """The layer class for `module`'s kind, or None where no adapter fits."""
    return next((layer_type for fits, layer_type in LAYER_TYPES if fits(module)), None)
