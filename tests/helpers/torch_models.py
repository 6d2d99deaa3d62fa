"""Small models that the tests of the engine share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCAB, WIDTH, CLASSES = 11, 8, 3


class ScaledEmbedding(nn.Embedding):
    """Like Gemma's: the rows of the table are multiplied by `embed_scale`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


# The module kinds that can carry adapters; all map the input of `example_input` to WIDTH values.
LAYERS = {
    "linear": lambda: nn.Linear(6, WIDTH),
    "linear-without-bias": lambda: nn.Linear(6, WIDTH, bias=False),
    "conv1d": lambda: Conv1D(WIDTH, 6),
    "embedding": lambda: nn.Embedding(VOCAB, WIDTH),
    "embedding-padding": lambda: nn.Embedding(VOCAB, WIDTH, padding_idx=3),
    "embedding-scaled": lambda: ScaledEmbedding(VOCAB, WIDTH, padding_idx=0),
}


def example_input(layer: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if layer.startswith("embedding"):
        return torch.randint(0, VOCAB, (4, 5))
    return torch.randn(4, 5, 6, dtype=dtype)


class Layer(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.proj = LAYERS[layer]()


class OneLayerNet(nn.Module):
    """Two numbered layers of the layer kind under test that both read the input, and a head."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(layer), Layer(layer)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = sum(torch.tanh(layer.proj(x)) for layer in self.layers)
        return self.head(self.norm(hidden))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / WIDTH**0.5
        return self.out(scores.softmax(-1) @ self.v(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(Conv1D(2 * WIDTH, WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Names as in real models: `embed`, `layers.0.attn.q`, `layers.1.mlp.0`, `norm`, `head`."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def token_ids() -> Tensor:
    return torch.arange(2 * 7).reshape(2, 7) % VOCAB
