"""`nn.Embedding` and its subclasses as hosts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.base import DeltaAdapter
from lora_lightning.hosts.base import Host, first_argument


class EmbeddingHost(Host):
    """y = E[ids] + sum of the live adapters' rows; weight (num_embeddings, embedding_dim)."""

    kind = "embedding"

    @staticmethod
    def dimensions(module: nn.Module) -> tuple[int, int]:
        """(num_embeddings, embedding_dim)."""
        num_embeddings, embedding_dim = module.weight.shape  # type: ignore[misc]
        return num_embeddings, embedding_dim

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's rows plus the live adapters' rows."""
        live = self.live_adapters()
        ids, args, kwargs = first_argument(self, args, kwargs)
        y = self.base_forward(live, ids, *args, **kwargs)
        for adapter in live:
            if isinstance(adapter, DeltaAdapter):
                y = adapter(
                    ids,
                    y,
                    padding_idx=self.padding_idx,
                    scale_grad_by_freq=self.scale_grad_by_freq,
                    embed_scale=getattr(self, "embed_scale", 1.0),
                )
        return y
