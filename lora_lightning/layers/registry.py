"""Module kinds that can carry adapters, one file each."""

from __future__ import annotations

from torch import nn

from lora_lightning.layers.base import Host
from lora_lightning.layers.conv import CONVOLUTIONS, ConvHost
from lora_lightning.layers.conv1d import Conv1DHost, is_conv1d
from lora_lightning.layers.embedding import EmbeddingHost
from lora_lightning.layers.linear import LinearHost
from lora_lightning.layers.multihead_attention import AttentionHost, attention_obstacle
from lora_lightning.layers.quantized.base import BitsandbytesHost, QuantizedHost
from lora_lightning.layers.quantized.bitsandbytes import is_linear4bit, is_linear8bit
from lora_lightning.layers.quantized.torchao import is_torchao_linear

SUPPORTED = "Linear, Conv1D (transformers), Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention"


def host_type_for(module: nn.Module) -> type[Host] | None:
    """The host class for `module`'s kind, or None where no adapter fits."""
    if is_linear4bit(module) or is_linear8bit(module):
        return BitsandbytesHost
    if is_torchao_linear(module):
        return QuantizedHost
    if isinstance(module, nn.Linear):
        return LinearHost
    if isinstance(module, nn.MultiheadAttention):
        return AttentionHost if attention_obstacle(module) is None else None
    if isinstance(module, nn.Embedding):
        return EmbeddingHost
    if isinstance(module, tuple(CONVOLUTIONS)):
        transposed = getattr(module, "transposed", False)
        return None if transposed else ConvHost
    return Conv1DHost if is_conv1d(module) else None
