"""DoRA: LoRA that learns the length of a weight's rows apart from their direction.

W' = m * (W + scaling * B A) / n,  n = ||W + scaling * B A|| by row, held constant in backward.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353),
equation 5; section 4.3 for the constant n. The norm needs no dense B A:

    n^2 = ||W||^2 + 2 scaling <W A^T, B> + scaling^2 diag(B (A A^T) B^T),  all by row.

As in PEFT, n is that of the base weight with this adapter alone, an embedding has one m for each
of its embedding_dim columns, and dropout applies to the input of the whole change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterSpec, BaseWeight
from lora_lightning.adapters.initialization import constant_
from lora_lightning.adapters.lora.conv import LoraConvAdapter
from lora_lightning.adapters.lora.embedding import LoraEmbeddingAdapter
from lora_lightning.adapters.lora.linear import LoraAdapter, LowRankAdapter
from lora_lightning.utilities.autocast import without_autocast


class _Dora(LowRankAdapter):
    """The magnitude and what it does; LoRA on one kind of weight stands beside it in the bases."""

    needs_weight = True
    additive = False
    lora_magnitude_vector: nn.Parameter
    magnitude_shape: tuple[int, ...]  # how m is laid along the output

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__(spec)
        outputs, ones = len(self.factors()[1]), [1 for _ in spec.shape[2:]]
        self.magnitude_shape = (-1, *ones)
        batch = ones[:1]  # PEFT's magnitude of a convolution is laid out as its output
        self.lora_magnitude_vector = spec.parameter(*batch, outputs, *ones)
        constant_(self.lora_magnitude_vector, 1)

    @torch.no_grad()
    def start_from_weight(self, weight: Tensor) -> None:
        """The magnitude is the norm, so that the adapter starts as a no-op."""
        super().start_from_weight(weight)
        self.lora_magnitude_vector.copy_(self._norm(weight).view_as(self.lora_magnitude_vector))

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + (m / n - 1) (y - b) + (m / n) scaling B A x, in y's dtype."""
        weight = base.base_weight()
        scale = self._mag_norm_scale(weight).view(self.magnitude_shape)
        dropout = self.training and not isinstance(self.lora_dropout, nn.Identity)
        if dropout and x.is_floating_point():  # ids of tokens are not dropped
            x = self.lora_dropout(x)
            mapped = base.apply_weight(x, weight.to(x.dtype))
        else:
            bias = base.bias_below(self)
            mapped = y if bias is None else y - bias.view(self.magnitude_shape).to(y.dtype)
        change = (scale - 1).to(y.dtype) * mapped + scale.to(y.dtype) * self.update(x, base)
        return y + change.to(y.dtype)

    def transform_weight(self, weight: Tensor, base: BaseWeight) -> Tensor:
        """(m / n) * (weight + scaling * B A)."""
        total = self.as_matrix(weight + self.delta_weight().to(weight))
        scale = self._mag_norm_scale(base.base_weight()).to(weight.dtype)
        return self.as_matrix(scale[:, None] * total).reshape(weight.shape)

    def _mag_norm_scale(self, weight: Tensor) -> Tensor:
        return self.lora_magnitude_vector.flatten() / self._norm(weight)

    @torch.no_grad()
    def _norm(self, weight: Tensor) -> Tensor:
        # Norms and small products in at least fp32, W A^T in the weight's own dtype: no copy of W.
        matrix = self.as_matrix(weight)
        wide = torch.promote_types(self.lora_magnitude_vector.dtype, torch.float32)
        a, b = (factor.to(wide) for factor in self.factors())
        with without_autocast(weight):
            square: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=a.dtype).square()
            mixed = (matrix @ a.t().to(matrix.dtype)).to(b.dtype)
            scale = self.scale()
            square = square + 2 * scale * (mixed * b).sum(1)
            square = square + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
        # Not below what divides: a row of zeros keeps m / n = 1 and can learn.
        return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


class DoraAdapter(_Dora, LoraAdapter):
    """DoRA on a linear map; lora_magnitude_vector (out)."""


class DoraEmbeddingAdapter(_Dora, LoraEmbeddingAdapter):
    """DoRA on an embedding table; lora_magnitude_vector (embedding_dim)."""


class DoraConvAdapter(_Dora, LoraConvAdapter):
    """DoRA on a convolution; lora_magnitude_vector (1, out, 1, ...).

    With groups, B A is no kernel of the base's shape. The norm n is then that of W + scaling * D,
    D being what PEFT has there: the product of B (out / groups, r) and A (r, in * kernel), whose
    values are laid out anew in W's shape.
    """

    @torch.no_grad()
    def _norm(self, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return super()._norm(weight)
        wide = torch.promote_types(self.lora_magnitude_vector.dtype, torch.float32)
        a, b = (factor.to(wide) for factor in self.factors())
        with without_autocast(weight):
            product = b.reshape(-1, self.r) @ a
            total = weight.to(wide) + self.scale() * product.view(weight.shape)
            square: Tensor = torch.linalg.vector_norm(total.flatten(1), dim=1).square()
        return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
