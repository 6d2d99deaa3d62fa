"""LoRA: a trainable low-rank update of a frozen weight.

W' = W + scaling * B A,  A (r, in), B (out, r),  scaling = lora_alpha / r.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685),
section 4.1; with use_rslora the scaling is lora_alpha / sqrt(r) (Kalajdzievski 2023,
arXiv:2312.03732). Tensor names and shapes are those of PEFT's files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import DeltaAdapter, master_dtype
from lora_lightning.config import LoraConfig, scaling
from lora_lightning.initialization import (
    generator_for,
    kaiming_uniform_,
    normal_,
    parameter,
    zeros_,
)


@dataclass(frozen=True)
class LoraSettings:
    """What one layer's adapter is made from.

    Attributes:
        config: The options shared by all layers.
        r, lora_alpha: Rank and alpha of this layer (patterns already applied).
        seed, name: What the random start values depend on.
        device, base_dtype: Of the base weight.

    """

    config: LoraConfig
    r: int
    lora_alpha: float
    seed: int
    name: str
    device: torch.device
    base_dtype: torch.dtype


class _LoraAdapter(DeltaAdapter):
    """What LoRA on a linear map and LoRA on an embedding table have in common."""

    def __init__(self, settings: LoraSettings) -> None:
        super().__init__()
        self.config = settings.config
        self.r = settings.r
        self.lora_alpha = settings.lora_alpha
        self.scaling = scaling(settings.config, settings.r, settings.lora_alpha)
        self.seed = settings.seed
        self.name = settings.name

    def _generator(self, tensor_name: str) -> torch.Generator:
        return generator_for(self.seed, f"{self.name}.{tensor_name}")

    def extra_repr(self) -> str:
        """Rank and alpha, as they appear in `print(model)`."""
        return f"r={self.r}, lora_alpha={self.lora_alpha:g}"


class LoraAdapter(_LoraAdapter):
    """LoRA on a linear map: y + scaling * B A dropout(x).

    The maths run in the activation's dtype: A and B (small) are cast to it, never the activation
    (large) to theirs.

    Shapes:
        x (..., in_features), y (..., out_features) -> (..., out_features);
        lora_A (r, in_features); lora_B (out_features, r).

    """

    def __init__(self, in_features: int, out_features: int, settings: LoraSettings) -> None:
        super().__init__(settings)
        dropout = settings.config.lora_dropout
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        dtype = master_dtype(settings.base_dtype)
        self.lora_A = parameter((self.r, in_features), settings.device, dtype)
        self.lora_B = parameter((out_features, self.r), settings.device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and B as `init_lora_weights` says; B A = 0 unless it is false."""
        if self.config.init_lora_weights == "gaussian":
            normal_(self.lora_A, 1 / self.r, self._generator("lora_A"))
        else:
            kaiming_uniform_(self.lora_A, self._generator("lora_A"))
        if self.config.init_lora_weights is False:
            kaiming_uniform_(self.lora_B, self._generator("lora_B"))
        else:
            zeros_(self.lora_B)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + scaling * B A dropout(x), in y's dtype."""
        x = self.lora_dropout(x)
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if not torch.is_autocast_enabled(x.device.type):  # which would cast x, A and B itself
            a, b = a.to(x.dtype), b.to(x.dtype)
        hidden = F.linear(x, a)
        if hidden.dtype != y.dtype:  # a base that answers in another dtype than it was asked in
            return y + (F.linear(hidden, b) * self.scaling).to(y.dtype)
        # One fused call: no output-sized temporaries for B h, for its scaling and for the sum.
        flat_y, flat_hidden = y.reshape(-1, y.shape[-1]), hidden.reshape(-1, self.r)
        return torch.addmm(flat_y, flat_hidden, b.t(), alpha=self.scaling).view(y.shape)

    def delta_weight(self) -> Tensor:
        """scaling * B A, (out_features, in_features)."""
        return self.scaling * (self.lora_B @ self.lora_A)


class LoraEmbeddingAdapter(_LoraAdapter):
    """LoRA on an embedding table: y + scaling * (B A)^T[ids].

    Here A starts at zero and B random; rows of tokens that never occur stay unchanged.

    Shapes:
        ids (...) of integers, y (..., embedding_dim) -> (..., embedding_dim);
        lora_embedding_A (r, num_embeddings); lora_embedding_B (embedding_dim, r).

    """

    def __init__(self, num_embeddings: int, embedding_dim: int, settings: LoraSettings) -> None:
        super().__init__(settings)
        dtype = master_dtype(settings.base_dtype)
        self.lora_embedding_A = parameter((self.r, num_embeddings), settings.device, dtype)
        self.lora_embedding_B = parameter((embedding_dim, self.r), settings.device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A zero and B ~ N(0, 1); both random where `init_lora_weights` is false."""
        if self.config.init_lora_weights is False:
            normal_(self.lora_embedding_A, 1.0, self._generator("lora_embedding_A"))
        else:
            zeros_(self.lora_embedding_A)
        normal_(self.lora_embedding_B, 1.0, self._generator("lora_embedding_B"))

    def forward(
        self,
        ids: Tensor,
        y: Tensor,
        *,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        embed_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """y + scaling * embed_scale * (B A)^T[ids], in y's dtype; arguments as in the table's own.

        `embed_scale` is what some models (Gemma) multiply the rows of the table with.
        """
        rows = F.embedding(
            ids,
            self.lora_embedding_A.t(),
            padding_idx=padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
        )
        # Autocast does not narrow an embedding lookup, so it must not narrow its update either.
        with torch.autocast(ids.device.type, enabled=False):
            update = F.linear(rows.to(y.dtype), self.lora_embedding_B.to(y.dtype))
        return y + (self.scaling * embed_scale) * update

    def delta_weight(self) -> Tensor:
        """scaling * (B A)^T, (num_embeddings, embedding_dim)."""
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).t()
