"""Multi-head attention between its projections, in the operations and the order of torch.

    head_i = softmax(q_i k_i^T / sqrt(d) + mask) v_i

(Vaswani et al. 2017, arXiv:1706.03762, section 3.2.) Source of the order, and so of the rounding:
`F.multi_head_attention_forward`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Masks(NamedTuple):
    """Which keys a query does not see, as `nn.MultiheadAttention.forward` is told.

    Shapes:
        key_padding (N, S); attention (L, S) or (N heads, L, S).

    """

    key_padding: Tensor | None
    attention: Tensor | None
    is_causal: bool

    def added_to_scores(self, q: Tensor, source: int, heads: int, is_causal: bool) -> Tensor | None:
        """Return what is added to the scores of q (L, N, e) and `source` keys.

        Shapes:
            (1 or N heads, 1 or L, S), or None where nothing is (or torch knows it: `is_causal`).

        """
        length, batch, _ = q.shape
        if self.is_causal and self.attention is None:
            raise RuntimeError(
                "is_causal=True is a hint about attn_mask, which must be given with it."
            )
        mask = None if is_causal else _as_numbers(self.attention, q.dtype)
        if mask is not None:
            expected = (length, source) if mask.dim() == 2 else (batch * heads, length, source)
            _check_shape("attn_mask", expected, mask)
            mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
        if self.key_padding is not None:
            _check_shape("key_padding_mask", (batch, source), self.key_padding)
            padding = cast(Tensor, _as_numbers(self.key_padding, q.dtype))
            padding = padding.view(batch, 1, 1, source).expand(-1, heads, -1, -1)
            padding = padding.reshape(batch * heads, 1, source)
            mask = padding if mask is None else mask + padding
        return mask


def attend(
    module: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    need_weights: bool,
    training: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the heads side by side, and their weights, as `F.multi_head_attention_forward` does.

    Shapes:
        q (L, N, e), k and v (S, N, e) -> (L, N, e), and (N, heads, L, S') or None; S' counts the
        rows that add_bias_kv and add_zero_attn append to k and v.

    """
    length, batch, embed_dim = q.shape
    heads, source = module.num_heads, k.shape[0]
    _check_shape("key", (source, batch, embed_dim), k)
    _check_shape("value", (source, batch, embed_dim), v)
    is_causal = masks.is_causal and masks.key_padding is None and not need_weights
    mask = masks.added_to_scores(q, source, heads, is_causal)

    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, module.bias_v.repeat(1, batch, 1)])
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(1, batch, embed_dim)]) for x in (k, v))
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[0] - source))
        source = k.shape[0]

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], batch * heads, embed_dim // heads).transpose(0, 1)

    q, k, v = by_head(q), by_head(k), by_head(v)
    dropout = module.dropout if training else 0.0
    if not need_weights:
        q, k, v = (x.view(batch, heads, -1, embed_dim // heads) for x in (q, k, v))
        if mask is not None:
            mask = mask.view(-1, heads if mask.shape[0] > 1 else 1, *mask.shape[1:])
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return y.permute(2, 0, 1, 3).reshape(length, batch, embed_dim), None
    q = q * math.sqrt(1 / q.shape[-1])
    scores = q @ k.transpose(1, 2) if mask is None else torch.baddbmm(mask, q, k.transpose(1, 2))
    weights = F.dropout(F.softmax(scores, dim=-1), dropout, training=dropout > 0)
    y = (weights @ v).transpose(0, 1).reshape(length, batch, embed_dim)
    return y, weights.view(batch, heads, *weights.shape[1:])


def _as_numbers(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return what a mask adds to the scores: minus infinity where a boolean one is True."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _check_shape(name: str, expected: tuple[int, ...], tensor: Tensor) -> None:
    if tuple(tensor.shape) != expected:
        raise RuntimeError(f"{name} should have shape {expected}, but has {tuple(tensor.shape)}.")
