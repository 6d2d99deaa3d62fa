"""Models of one layer for every layer kind, adapters whose values matter, and a small Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_lightning import LoraConfig, inject_adapter
from lora_lightning.layers.traversal import named_parameters
from tests.helpers.tensors import randomize

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def add_adapter(model: nn.Module, name: str, seed: int = 0, **options: Any) -> nn.Module:
    """An adapter with values that matter."""
    inject_adapter(model, LoraConfig(**{"r": 2, **options}), name)
    torch.manual_seed(seed + len(name) + ord(name[0]))
    randomize([p for n, p in named_parameters(model) if f".adapters.{name}." in n], 0.3)
    return model


LAYER_KINDS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(5, 4, 6)),
    "conv1D": (lambda: Conv1D(8, 6), lambda: torch.randn(5, 4, 6)),
    "embedding": (lambda: nn.Embedding(9, 8), lambda: torch.randint(0, 9, (5, 4))),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: torch.randn(5, 6, 4, 4)),
    "grouped": (lambda: nn.Conv1d(6, 8, 3, groups=2), lambda: torch.randn(5, 6, 7)),
}


class LayerAndHead(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.proj = LAYER_KINDS[kind][0]()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        y = y.flatten(2).mT if y.shape[-1] != 8 or y.dim() == 4 else y
        return self.head(torch.tanh(y))


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def tied_llama(tied: bool = True) -> LlamaForCausalLM:
    """A Llama of one layer whose head is its table, unless not `tied`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def tied_llama_ids() -> Tensor:
    return torch.arange(32).view(2, 16) % 16


def adapted(model: nn.Module, name: str = "default", **options) -> nn.Module:
    inject_adapter(model, LoraConfig(**{"r": 2, **options}), name)
    randomize(p for key, p in named_parameters(model) if f".adapters.{name}." in key)
    return model
