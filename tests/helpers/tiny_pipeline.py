"""A module that holds a part of a diffusers pipeline: its text encoder, random and tiny."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn


class Pipeline(nn.Module):
    """What a LightningModule that trains a pipeline holds."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder


def text_encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()
