"""Combine what several fine-tunings made of one weight: dense task vectors and low-rank products.

Task vectors t_i (equal shapes) with weights w_i merge to, entry by entry,

    linear, magnitude_prune, dare_linear:  sum_i w_i p_i
    ties, dare_ties:                       sum_i w_i p_i m_i / max(1, sum_i m_i)

p_i is t_i pruned: not at all (linear), to its largest entries (ties, magnitude_prune), or at random
and rescaled (dare_*). m_i is 1 where p_i has the elected sign, else 0.

Updates delta_i = s_i B_i A_i of scaling s_i combine, with c_i = w_i s_i, to one B A:

    cat          sum_i w_i delta_i, exact: B = [B_1 .. B_n], A = [c_1 A_1; ..; c_n A_n]
    svd          the best approximation of sum_i w_i delta_i of a given rank
    linear, ties, dare_linear, dare_ties, magnitude_prune
                 A and B merged apart, B_i with weights sqrt|c_i|, A_i with sign(c_i) sqrt|c_i|;
                 rough, since a product of two sums has cross terms B_i A_j
    ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd
                 delta_1 .. delta_n merged as dense matrices with weights w_i, then as svd

Sources: Ilharco et al. 2022, "Editing models with task arithmetic" (arXiv:2212.04089), for the
sum; Yadav et al. 2023, "TIES-Merging" (arXiv:2306.01708), Algorithm 1, for trim, elect sign and
disjoint mean; Yu et al. 2023, "DARE" (arXiv:2311.03099), for dropping and rescaling. What becomes
of A and B, and that weights apply after the election (a negative one subtracts what was elected),
is PEFT's choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from lora_lightning.adapters.config import check_choice, check_rank
from lora_lightning.adapters.initialization import generator_for
from lora_lightning.errors import ConfigError, RankError
from lora_lightning.utilities.autocast import without_autocast

Merge = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
MajoritySignMethod = Literal["total", "frequency"]
CombinationType = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd",
    "dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


def merge_task_vectors(
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    merge: Merge = "linear",
    *,
    density: float = 1.0,
    majority_sign_method: MajoritySignMethod = "total",
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """One tensor from task vectors of equal shape, by the formulas above.

    Args:
        vectors, weights, merge: What is merged, with a weight for each, and by which formula.
        density: The share of entries that pruning keeps, 0 < density <= 1.
        majority_sign_method: Which sign is elected: that of the sum ("total"), or the one that
            more of the vectors have ("frequency").
        generators: For dare_*: where the random numbers of each vector come from (on the CPU).

    """
    if merge in ("ties", "magnitude_prune"):
        vectors = [magnitude_prune(vector, density) for vector in vectors]
    elif merge in ("dare_linear", "dare_ties"):
        vectors = [
            random_prune(vector, density, generator)
            for vector, generator in zip(vectors, generators, strict=True)
        ]
    stacked = torch.stack(list(vectors))
    factors = stacked.new_tensor(list(weights)).reshape(-1, *[1] * (stacked.ndim - 1))
    if merge not in ("ties", "dare_ties"):
        return (factors * stacked).sum(0)
    agrees = stacked.sign() == elected_sign(stacked, majority_sign_method)
    return (factors * stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def magnitude_prune(tensor: Tensor, density: float) -> Tensor:
    """The floor(density * numel) entries of largest magnitude; the others become 0."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(tensor.shape)


def random_prune(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability `density` and divided by it, so that the mean stays."""
    # Drawn on the CPU, so that the same seed keeps the same entries on every device.
    kept = torch.rand(tensor.shape, generator=generator) < density
    return tensor * kept.to(tensor.device) / density


def elected_sign(stacked: Tensor, method: MajoritySignMethod = "total") -> Tensor:
    """+1 or -1 for every entry, from the vectors stacked along dimension 0; a draw gives +1."""
    votes = stacked if method == "total" else stacked.sign()
    return torch.where(votes.sum(0) >= 0, 1, -1)


# -- products of low rank, B (..., out, r) times A (..., r, in), batched over leading dimensions --


def sum_of_products(bs: Sequence[Tensor], as_: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of sum_i B_i A_i, exact: [B_1 .. B_n] and [A_1; ..; A_n].

    Their inner size is sum_i r_i; where that exceeds min(out, in), the rank that any matrix of
    this size has at most, a QR decomposition takes the surplus out.
    """
    b, a = torch.cat(list(bs), -1), torch.cat(list(as_), -2)
    if a.shape[-2] <= min(b.shape[-2], a.shape[-1]):
        return b, a
    if b.shape[-2] <= a.shape[-1]:
        q, r = torch.linalg.qr(b)  # (out, out), (out, sum r)
        return q, r @ a
    q, r = torch.linalg.qr(a.mT)  # (in, in), (in, sum r)
    return b @ r.mT, q.mT


def truncated_product(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors U S and V^T of the best approximation of B A of at most `rank`.

    Best in the Frobenius and the spectral norm (Eckart and Young 1936). Where r is small, B A is
    never formed: with B = Q_b R_b and A^T = Q_a R_a, the (r, r) matrix R_b R_a^T has the singular
    values of B A, and Q_b, Q_a turn its singular vectors into those of B A.
    """
    r = a.shape[-2]
    if not rank <= r < min(b.shape[-2], a.shape[-1]):
        return truncated_svd(b @ a, rank)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    us, vh = truncated_svd(r_b @ r_a.mT, rank)
    return q_b @ us, vh @ q_a.mT


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U S (..., out, rank) and V^T (..., rank, in) of the `rank` largest singular values."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u * s.unsqueeze(-2))[..., :rank], vh[..., :rank, :]


# -- updates of low rank ------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """Update of one weight by one adapter: scaling * B A and, with `lora_bias`, scaling * bias.

    Shapes:
        a (groups, r / groups, in), b (groups, out / groups, r / groups), bias (out); groups is
        that of a convolution, else 1.

    """

    name: str  # of the adapter
    scaling: float
    a: Tensor
    b: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of all groups together."""
        return self.a.shape[0] * self.a.shape[1]


@dataclass(frozen=True)
class Combination:
    """Rule by which updates become one; the options of `add_weighted_adapter`."""

    combination_type: CombinationType
    svd_rank: int | None = None
    svd_clamp: float | None = None
    density: float | None = None
    majority_sign_method: MajoritySignMethod = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("combination_type", self.combination_type, get_args(CombinationType))
        methods = get_args(MajoritySignMethod)
        check_choice("majority_sign_method", self.majority_sign_method, methods)
        svd, prunes = self.combination_type.endswith("svd"), self.merge != "linear"
        for key, used in (("svd_rank", svd), ("svd_clamp", svd), ("density", prunes)):
            if getattr(self, key) is not None and not used:
                raise ConfigError(
                    f"{key}={getattr(self, key)!r} has no meaning for combination_type "
                    f"{self.combination_type!r}. Leave it out. (lora.{key})"
                )
        if self.svd_rank is not None:
            check_rank("svd_rank", self.svd_rank)
        if self.svd_clamp is not None and not 0.5 < self.svd_clamp <= 1:
            raise ConfigError(
                f"svd_clamp is {self.svd_clamp!r}; it is a quantile, 0.5 < svd_clamp <= 1 (1 "
                "clamps nothing). (lora.svd_clamp)"
            )
        if prunes and (self.density is None or not 0 < self.density <= 1):
            raise ConfigError(
                f"density is {self.density!r}; combination_type {self.combination_type!r} needs "
                "the share of entries to keep, 0 < density <= 1. (lora.density)"
            )

    @property
    def merge(self) -> Merge:
        """Rule for task vectors; "linear" for cat and svd."""
        merge = self.combination_type.removesuffix("_svd")
        return cast(Merge, "linear" if merge in ("cat", "svd") else merge)

    def check(self, path: str, updates: Sequence[Update]) -> None:
        """Refuse unequal ranks where A and B merge apart, and svd_rank that groups cannot share."""
        if self.combination_type in get_args(Merge) and len({u.rank for u in updates}) > 1:
            raise RankError(
                f"combination_type {self.combination_type!r} merges A and B entry by entry, which "
                f"needs equal ranks, but those on {path!r} are "
                f"{', '.join(f'{u.rank} ({u.name!r})' for u in updates)}. Use 'cat', 'svd' or a "
                "type that ends in '_svd'. (lora.combination_type)"
            )
        groups = updates[0].a.shape[0]
        if self.svd_rank is not None and self.svd_rank % groups:
            raise RankError(
                f"svd_rank={self.svd_rank} cannot be shared out over the {groups} groups of "
                f"{path!r}: it must be a multiple of them. (lora.svd_rank)"
            )

    def combine(self, path: str, updates: Sequence[Update], weights: Sequence[float]) -> Update:
        """One update of scaling 1 from those of several adapters on one weight."""
        with without_autocast(updates[0].a):  # which would narrow B A
            b, a = self._factors(path, updates, weights)
        owners = [(u, w) for u, w in zip(updates, weights, strict=True) if u.bias is not None]
        if not owners:
            return Update("", 1.0, a, b)
        with_bias, their_weights = zip(*owners, strict=True)
        biases = [u.scaling * cast(Tensor, u.bias) for u in with_bias]
        return Update("", 1.0, a, b, self._merge(f"{path}.bias", with_bias, biases, their_weights))

    def _factors(
        self, path: str, updates: Sequence[Update], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        coefficients = [w * u.scaling for w, u in zip(weights, updates, strict=True)]
        if self.combination_type in get_args(Merge):
            roots = [math.sqrt(abs(c)) for c in coefficients]
            signed = [math.copysign(root, c) for root, c in zip(roots, coefficients, strict=True)]
            a = self._merge(f"{path}.lora_A", updates, [u.a for u in updates], signed)
            b = self._merge(f"{path}.lora_B", updates, [u.b for u in updates], roots)
            return sum_of_products([b], [a])
        if self.combination_type in ("cat", "svd"):
            scaled = [c * u.a for c, u in zip(coefficients, updates, strict=True)]
            b, a = sum_of_products([u.b for u in updates], scaled)
            if self.combination_type == "cat":
                return b, a
            return self._clamp(*truncated_product(b, a, self._rank_by_group(updates)))
        deltas = [u.scaling * (u.b @ u.a) for u in updates]
        dense = self._merge(f"{path}.delta", updates, deltas, weights)
        return self._clamp(*truncated_svd(dense, self._rank_by_group(updates)))

    def _merge(
        self, name: str, updates: Sequence[Update], vectors: list[Tensor], weights: Sequence[float]
    ) -> Tensor:
        return merge_task_vectors(
            vectors,
            weights,
            self.merge,
            density=1.0 if self.density is None else self.density,
            majority_sign_method=self.majority_sign_method,
            generators=[generator_for(self.seed, f"{name}.{u.name}") for u in updates],
        )

    def _rank_by_group(self, updates: Sequence[Update]) -> int:
        groups, out, _ = updates[0].b.shape
        wanted = self.svd_rank or max(u.rank for u in updates)
        return min(wanted // groups, out, updates[0].a.shape[2])

    def _clamp(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        if self.svd_clamp is None:
            return b, a
        sizes = torch.cat([b.flatten(), a.flatten()]).abs()
        # The q-quantile of the entries and their negatives is the (2 q - 1)-quantile of the sizes.
        limit = sizes.kthvalue(1 + round((2 * self.svd_clamp - 1) * (sizes.numel() - 1))).values
        return b.clamp(-limit, limit), a.clamp(-limit, limit)
