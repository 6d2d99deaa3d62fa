"""LoKr: an update that is the Kronecker product of two small matrices.

W' = W + scaling * (W1 kron W2),  scaling = alpha / r. With out = h k and in = m n, W1 is (h, m), W2
is (k, n), and block (i, j) of the update is W1[i, j] W2. W2 may be a product A B of rank r, or of a
core and two matrices (use_effective_conv2d); W1 too with decompose_both.

The update acts without ever being written out: x, laid out as X (m, n), gives Y (h, k) with

    Y = W1 X W2^T = W1 (X B^T) A^T,

that is m n r + h m r + h k r products per token instead of h k m n. A kernel's positions belong to
W2 or B; the other two products are then convolutions over single positions.

Source: KronA, Edalati et al. 2022 (arXiv:2212.10650), equation 5; LyCORIS, Yeh et al. 2023
(arXiv:2309.14859), section 3. Names, shapes and start values are PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterSpec, BaseWeight, Convolution
from lora_lightning.adapters.lycoris import LycorisAdapter, LycorisConfig, contract_core, recompute
from lora_lightning.errors import ConfigError
from lora_lightning.utilities.autocast import product_dtype

# On kernels, small convolutions in a row are slower than their number of products says: they were
# faster than the dense one below an eighth of its products (one CPU thread, 16 to 320 channels).
_WORTH_IT = 1 / 8
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, kw_only=True)
class LokrConfig(LycorisConfig):
    """Options of a LoKr adapter; names and defaults are those of PEFT.

    h = W x + b + scaling * (W1 kron W2) x,  scaling = alpha / r.  (arXiv:2212.10650,
    arXiv:2309.14859)

    Args:
        r: Rank of W2, which is a full matrix where r is at least half its larger side: any r
            beyond that only changes the scaling.
        decompose_both: Give W1 the rank r too, where r is less than half its larger side.
        decompose_factor: Size of W1's sides: the layer's sizes are divided by it where they can
            be, else by their largest divisor below it. -1: as near to square as they can be.
        rank_dropout_scale: Enlarge the rows that are left accordingly.
        init_weights: true: W1 is zero (the adapter starts as a no-op); "lycoris": W2 is, as in
            the LyCORIS library; false: neither, for tests. All else is Kaiming-uniform.

    """

    peft_type = "LOKR"
    free_to_change = LycorisConfig.free_to_change | {"rank_dropout_scale"}
    starts = (True, False, "lycoris")

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def __post_init__(self) -> None:
        factor = self.decompose_factor
        if not isinstance(factor, int) or isinstance(factor, bool) or (factor < 1 and factor != -1):
            raise ConfigError(
                f"decompose_factor is {factor!r}; it is the size of W1's sides, an integer of at "
                "least 1, or -1 for nearly square. (lora.decompose_factor)"
            )
        super().__post_init__()


LoKrConfig = LokrConfig  # PEFT's spelling


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`dimension` as a product of two.

    (factor, dimension / factor) where that goes; otherwise the first is the largest divisor of
    `dimension` up to its square root and, unless `factor` is -1, up to `factor`.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    largest = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    first = next(d for d in range(largest, 0, -1) if dimension % d == 0)
    return first, dimension // first


class LokrAdapter(LycorisAdapter):
    """LoKr on a linear map or a convolution.

    Shapes, with out = h k and in / groups = m n:
        lokr_w1 (h, m), or lokr_w1_a (h, r) and lokr_w1_b (r, m); lokr_w2 (k, n, *kernel), or
        lokr_w2_a (k, r) and lokr_w2_b (r, n * positions), or lokr_t2 (r, r, *kernel), lokr_w2_a
        (r, k) and lokr_w2_b (r, n).

    """

    config: LokrConfig

    lokr_w1: nn.Parameter | None
    lokr_w1_a: nn.Parameter
    lokr_w1_b: nn.Parameter
    lokr_w2: nn.Parameter | None
    lokr_w2_a: nn.Parameter
    lokr_w2_b: nn.Parameter
    lokr_t2: nn.Parameter | None

    def __init__(self, spec: AdapterSpec) -> None:
        config: LokrConfig = spec.config
        rows, columns, *kernel = spec.shape
        h, k = factorization(rows, config.decompose_factor)
        m, n = factorization(columns, config.decompose_factor)
        r = spec.rank()
        super().__init__(spec, r)
        self.lokr_w1 = self.lokr_w2 = self.lokr_t2 = None
        if config.decompose_both and r < max(h, m) / 2:
            self.lokr_w1_a, self.lokr_w1_b = spec.parameter(h, r), spec.parameter(r, m)
        else:
            self.lokr_w1 = spec.parameter(h, m)
        if r >= max(k, n) / 2:
            self.lokr_w2 = spec.parameter(k, n, *kernel)
        elif self.effective:
            self.lokr_t2 = self.core()
            self.lokr_w2_a, self.lokr_w2_b = spec.parameter(r, k), spec.parameter(r, n)
        else:
            self.lokr_w2_a = spec.parameter(k, r)
            self.lokr_w2_b = spec.parameter(r, n * math.prod(kernel))
        self.b_shape = (k if self.lokr_w2 is not None else r, n, *kernel)
        # PEFT's torch.kron lines up W1's dimensions with the last two of W2, which for a full
        # kernel of a Conv1d are (in, position): not the blocks above, but what its files mean.
        shifted = len(kernel) == 1 and self.lokr_w2 is not None
        self.order = "ij,ac...->aicj..." if shifted else "ij,ac...->iajc..."
        self.uses_factors = not shifted and self._is_cheap(h, m)
        self.reset_parameters()

    def _is_cheap(self, h: int, m: int) -> bool:
        """Tell whether the update is computed as Y = W1 (X B^T) A^T and not as a dense weight."""
        conv, (rows, *rest) = self.spec.conv, self.spec.shape
        if conv is None:
            return True
        if conv.padding_mode != "zeros" or h % conv.groups:
            return False
        columns = math.prod(rest)
        of_a = 0 if self.lokr_w2 is not None else rows
        return (
            self.b_shape[0] * (conv.groups * columns + h * m + of_a) <= _WORTH_IT * rows * columns
        )

    def reset_parameters(self) -> None:
        """W1 or its A zero, "lycoris": W2 or its B zero; all others Kaiming-uniform."""
        super().reset_parameters()
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}
        self.start(*zero[self.config.init_weights])

    def factors(self, strength: float | Tensor) -> list[Tensor]:
        """W1 (h, m) times `strength`; B (r, n, *kernel) and A (k, r), or W2 (k, n, *kernel)."""
        w1 = self.lokr_w1_a @ self.lokr_w1_b if self.lokr_w1 is None else self.lokr_w1
        w1 = w1 * strength
        if self.lokr_w2 is not None:
            return [w1, self.lokr_w2]
        if self.lokr_t2 is not None:
            b = contract_core(self.lokr_t2, self.lokr_w2_b).reshape(self.b_shape)
            return [w1, b, self.lokr_w2_a.t()]
        return [w1, self.lokr_w2_b.view(self.b_shape), self.lokr_w2_a]

    def delta_weight(self) -> Tensor:
        """scaling * (W1 kron W2), (out, in, *kernel)."""
        return self._dense(*self.factors(self.scale()))

    def _dense(self, w1: Tensor, b: Tensor, a: Tensor | None = None) -> Tensor:
        w2 = b if a is None else (a @ b.flatten(1)).view(-1, *b.shape[1:])
        return torch.einsum(self.order, w1, w2).reshape(self.spec.shape)

    def update(self, x: Tensor, base: BaseWeight) -> Tensor:
        """W1 (X B^T) A^T, or the base's map with the dense product as its weight."""
        dtype = product_dtype(x)
        factors = [factor.to(dtype) for factor in self.factors(self.strength())]
        x = x.to(dtype)
        if not self.uses_factors:
            y = base.apply_weight(x, self._dense(*factors))
        elif self.spec.conv is None:
            y = recompute(kronecker_linear, x, *factors)
        else:
            y = recompute(partial(kronecker_convolution, self.spec.conv), x, *factors)
        rows = self.kept_rows(self.config.rank_dropout_scale)
        return y if rows is None else y * rows.view(-1, *(1 for _ in self.spec.shape[2:])).to(dtype)


def kronecker_linear(x: Tensor, w1: Tensor, b: Tensor, a: Tensor | None = None) -> Tensor:
    """F.linear(x, W1 kron W2): x (..., m n), w1 (h, m), W2 = b (k, n) or a (k, r) b (r, n)."""
    y = F.linear(x.reshape(-1, w1.shape[1], b.shape[1]), b)
    y = F.linear(y.transpose(1, 2), w1).transpose(1, 2)
    if a is not None:
        y = F.linear(y, a)
    return y.reshape(*x.shape[:-1], y.shape[1] * y.shape[2])


def kronecker_convolution(
    conv: Convolution, x: Tensor, w1: Tensor, b: Tensor, a: Tensor | None = None
) -> Tensor:
    """The convolution with W1 kron W2: W2 on each of m parts of the channels, then W1 across.

    x (..., groups m n, *size), w1 (h, m), W2 = b (k, n, *kernel) or a (k, r) b (r, n, *kernel); h
    a multiple of the groups.
    """
    convolve = _CONVOLUTIONS[conv.dims]
    parts = x.reshape(-1, b.shape[1], *x.shape[-conv.dims :])
    y = convolve(parts, b, None, conv.stride, conv.padding, conv.dilation)
    k, *size = y.shape[1:]
    y = y.reshape(-1, conv.groups * w1.shape[1], k * math.prod(size))
    y = F.conv1d(y, w1.unsqueeze(-1), groups=conv.groups)
    if a is not None:
        y = convolve(y.view(-1, k, *size), a.reshape(*a.shape, *(1 for _ in size)))
        k = a.shape[0]
    return y.reshape(*x.shape[: -conv.dims - 1], w1.shape[0] * k, *size)
