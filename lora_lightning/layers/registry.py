"""Module kinds that can carry adapters, one file each."""

from __future__ import annotations

from torch import nn

from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.conv import CONVOLUTIONS, AdaptedConv
from lora_lightning.layers.conv1d import AdaptedConv1D, is_conv1d
from lora_lightning.layers.embedding import AdaptedEmbedding
from lora_lightning.layers.linear import AdaptedLinear
from lora_lightning.layers.multihead_attention import AdaptedMultiheadAttention, attention_obstacle
from lora_lightning.layers.quantized.base import AdaptedBitsandbytesLinear, AdaptedQuantizedLinear
from lora_lightning.layers.quantized.bitsandbytes import is_linear4bit, is_linear8bit
from lora_lightning.layers.quantized.torchao import is_torchao_linear

SUPPORTED = "Linear, Conv1D (transformers), Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention"


def layer_type_for(module: nn.Module) -> type[AdaptedLayer] | None:
    """The layer class for `module`'s kind, or None where no adapter fits."""
    if is_linear4bit(module) or is_linear8bit(module):
        return AdaptedBitsandbytesLinear
    if is_torchao_linear(module):
        return AdaptedQuantizedLinear
    if isinstance(module, nn.Linear):
        return AdaptedLinear
    if isinstance(module, nn.MultiheadAttention):
        return AdaptedMultiheadAttention if attention_obstacle(module) is None else None
    if isinstance(module, nn.Embedding):
        return AdaptedEmbedding
    if isinstance(module, tuple(CONVOLUTIONS)):
        transposed = getattr(module, "transposed", False)
        return None if transposed else AdaptedConv
    return AdaptedConv1D if is_conv1d(module) else None
