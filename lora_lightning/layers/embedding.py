"""`nn.Embedding` and its subclasses as layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.by_weight import AdaptedByWeight
from lora_lightning.layers.own_forward import has_own_forward, is_lookup


class AdaptedEmbedding(AdaptedLayer):
    """y = E[ids], weight (num_embeddings, embedding_dim)."""

    kind = "embedding"
    padding_idx: int | None
    scale_grad_by_freq: bool

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Rows of another table, treated as the table's own: padding, gradient scale, embed_scale.

        `embed_scale` is what some models (Gemma) multiply their rows with. `max_norm` belongs to
        the table's own rows only.
        """
        scale_grad = self.scale_grad_by_freq
        rows = F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=scale_grad)
        return rows * getattr(self, "embed_scale", 1.0)


class AdaptedEmbeddingByWeight(AdaptedByWeight, AdaptedEmbedding):
    """y = f(...; E'): a table whose forward is no lookup of ids (one of positions, say)."""


def is_embedding_by_weight(module: nn.Module) -> bool:
    """Tell whether a table's forward is something else than a lookup of ids."""
    if isinstance(module, AdaptedLayer):
        return isinstance(module, AdaptedByWeight)
    return has_own_forward(type(module), nn.Embedding) and not is_lookup(module)
