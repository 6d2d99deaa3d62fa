"""Start values of A and B that are more than independent random numbers.

Those computed from the base weight W (out, in) come with a promise: the adapter subtracts
scaling * B A of its start, so that the model begins as the base model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError, RankError

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class LoftqConfig:
    """Options of init_lora_weights="loftq".

    Args:
        weights: The base weights of before they were rounded: a safetensors file, or a folder of
            them such as a model is saved in.

    """

    weights: str


LoftQConfig = LoftqConfig  # PEFT's spelling


@dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """Options of init_lora_weights="eva"; names and defaults are those of PEFT.

    Args:
        rho: No layer gets a rank above rho * r, rho >= 1; 1 leaves the ranks as they are.
        tau: Components count as found when they turn by less than this cosine from one batch to
            the next.
        use_label_mask: Leave out positions whose label is label_mask_value, where batches are
            dictionaries with "labels" (and those whose "attention_mask" is 0).
        label_mask_value: See use_label_mask.
        whiten: Divide each component by the root of its singular value.
        adjust_scaling_factors: Change a layer's alpha with its rank, so that its scaling stays.
        max_batches: Look at no more batches than this.

    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True
    max_batches: int = 64

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise ConfigError(f"rho is {self.rho!r}; it is at least 1. (lora.eva_config.rho)")
        if not 0 < self.tau < 1:
            raise ConfigError(f"tau is {self.tau!r}; 0 < tau < 1. (lora.eva_config.tau)")
        if self.max_batches < 1:
            raise ConfigError(
                f"max_batches is {self.max_batches!r}; it is at least 1. "
                "(lora.eva_config.max_batches)"
            )


def pissa_factors(
    weight: Tensor, r: int, scaling: float, option: str, generator: torch.Generator
) -> Factors:
    """The r leading singular triplets of W = U S V^T, shared out over A and B.

    A = sqrt(S_r / scaling) V_r^T, B = U_r sqrt(S_r / scaling), so scaling * B A is the best rank-r
    approximation of W. "pissa_niter_N" finds them by N power iterations on a random subspace.

    Source: Meng et al. 2024, "PiSSA" (arXiv:2404.02948), equations 2-4; section 5 for the fast SVD.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if option == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        u, s, vh = _svd_lowrank(weight, r, int(option.rpartition("_")[2]), generator)
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


def olora_factors(
    weight: Tensor, r: int, scaling: float, option: str, generator: torch.Generator
) -> Factors:
    """The first r columns of Q and rows of R in W = Q R.

    B = Q[:, :r], A = R[:r].

    Source: Büyükakyüz 2024, "OLoRA" (arXiv:2406.01775), section 3.
    """
    q, upper = torch.linalg.qr(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    return upper[:r], q[:, :r]


START_FROM_WEIGHT = {"pissa": pissa_factors, "olora": olora_factors}


def orthogonal_factors(
    r: int, shape: tuple[int, ...], path: str, generator: torch.Generator
) -> Factors:
    """Random A (r, in) and B (out, r) with B A = 0: both learn from the first step on.

    A = (X Q_even)^T / 10 and B = Y^T Q_odd / 10 for Gaussian X (in, r/2), Y (r/2, out) and the even
    and odd rows of an orthogonal Q (r, r), which are orthogonal to each other.

    Raises:
        RankError: If r is odd.

    """
    if r % 2:
        raise RankError(
            f"init_lora_weights='orthogonal' splits the rank in halves, but r={r} at {path!r} is "
            f"odd. Use r={r + 1}. (lora.r)"
        )
    out_features, in_features = shape
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    x = torch.randn(in_features, r // 2, generator=generator)
    y = torch.randn(r // 2, out_features, generator=generator)
    return (x @ q[0::2]).t() / 10, y.t() @ q[1::2] / 10


def _svd_lowrank(
    weight: Tensor, r: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    # Halko et al. 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1; not torch.svd_lowrank, which
    # draws the subspace from the global generators.
    draws = torch.randn(weight.shape[1], r, generator=generator, dtype=weight.dtype)
    q, _ = torch.linalg.qr(weight @ draws.to(weight.device))
    for _ in range(iterations):
        q, _ = torch.linalg.qr(weight.t() @ q)
        q, _ = torch.linalg.qr(weight @ q)
    u, s, vh = torch.linalg.svd(q.t() @ weight, full_matrices=False)
    return q @ u, s, vh
