"""An adapter's update as one product B A with a scale of 1: what plain LoRA can hold of it.

Exact for every update that is of low rank by its formula: LoRA in all its starts, AdaLoRA, VeRA,
and LoHa and LoKr where their ranks are small next to the weight:

    LoHa   (A1 B1) o (A2 B2)  = sum over s, t of (A1[:, s] A2[:, t]) (B1[s, :] B2[t, :]),  rank r^2
    LoKr   (P Q) kron (A B)   = (P kron A) (Q kron B),  rank (rank of P Q) r
    VeRA   diag(b) B diag(d) A,  rank r

Sources: FedPara (arXiv:2108.06098), proposition 2; the mixed-product rule of Kronecker products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_lightning.adapters.adalora import AdaLoraAdapter
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.loha import LohaAdapter
from lora_lightning.adapters.lokr import LokrAdapter
from lora_lightning.adapters.lora.experts import LoraExpertsAdapter
from lora_lightning.adapters.lora.linear import LowRankAdapter
from lora_lightning.adapters.vera import VeraAdapter
from lora_lightning.errors import AdapterStateError

Factors = tuple[Tensor, Tensor]


@torch.no_grad()
def plain_factors(adapter: Adapter) -> Factors:
    """A (k, n) and B (m, k), in float64, with B A = the update.

    The update of a weight (m, n), of a kernel as the matrix (out, in * positions), of an embedding
    as its transpose (embedding_dim, num_embeddings).

    Raises:
        AdapterStateError: Saying why it is no product of low rank.

    """
    _check_additive(adapter)
    if isinstance(adapter, AdaLoraAdapter):
        kept = adapter.lora_E.flatten() != 0  # the others are rows that add nothing
        a, b = adapter.lora_A[kept].double(), adapter.lora_B[:, kept].double()
        return a, b * (adapter.scaling * adapter.lora_E[kept].double().T)
    if isinstance(adapter, LowRankAdapter):
        a, b = adapter.factors()
        return a.double(), adapter.scaling * b.double()
    if isinstance(adapter, VeraAdapter):
        a, b = adapter.matrices(adapter.vera_lambda_b.device)
        d, outer = adapter.vera_lambda_d.double(), adapter.vera_lambda_b.double()
        return a.double(), adapter.scaling * outer[:, None] * b.double() * d
    if isinstance(adapter, LohaAdapter):
        a1, b1, a2, b2 = (factor.double() for factor in adapter.factors(adapter.scaling))
        _check_rank(len(b1) * len(b2), a1.shape[0], b1.shape[1])
        return hadamard_factors(a1, b1, a2, b2)
    if isinstance(adapter, LokrAdapter):
        return _kronecker_of(adapter)
    raise AdapterStateError(
        f"an update of the type {adapter.config.peft_type} is no product of two small matrices"
    )


def hadamard_factors(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Factors:
    """A and B with B A = (A1 B1) o (A2 B2); their rank is the product of the two."""
    b = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
    a = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
    return a, b


def kronecker_factors(w1: Factors, w2: Factors) -> Factors:
    """A and B with B A = (B1 A1) kron (B2 A2); their rank is the product of the two."""
    return torch.kron(w1[0].contiguous(), w2[0].contiguous()), torch.kron(
        w1[1].contiguous(), w2[1].contiguous()
    )


def split(matrix: Tensor) -> Factors:
    """A and B with B A = `matrix`, of the rank of its smaller side."""
    rows, columns = matrix.shape
    one = torch.eye(min(rows, columns), dtype=matrix.dtype)
    return (one, matrix) if columns <= rows else (matrix, one)


def _kronecker_of(adapter: LokrAdapter) -> Factors:
    if adapter.lokr_w2 is not None or len(adapter.spec.shape) > 2:
        raise AdapterStateError(
            "the second matrix of its Kronecker product is a full one, so the update is of full "
            "rank"
        )
    _, b, a = (factor.double() for factor in adapter.factors(1.0))
    if adapter.lokr_w1 is None:
        w1 = adapter.lokr_w1_b.double(), adapter.lokr_w1_a.double()
    else:
        w1 = split(adapter.lokr_w1.double())
    _check_rank(len(w1[0]) * len(b), *adapter.spec.shape)
    a, b = kronecker_factors(w1, (b, a))
    return a, adapter.scaling * b


def _check_additive(adapter: Adapter) -> None:
    """Refuse what is more than a matrix that is added to the weight."""
    config = adapter.config
    if isinstance(adapter, LoraExpertsAdapter):
        raise AdapterStateError("it is on a parameter (lora.target_parameters), not on a module")
    if getattr(config, "use_dora", False):
        raise AdapterStateError("DoRA rescales the rows of the base weight as well (lora.use_dora)")
    if getattr(adapter, "lora_B_bias", None) is not None:
        raise AdapterStateError("it has a bias of its own (lora.lora_bias)")
    if adapter.spec.groups > 1:
        raise AdapterStateError("it is on a convolution with groups")


def _check_rank(rank: int, *shape: int) -> None:
    if rank >= min(shape[0], math.prod(shape[1:])):
        raise AdapterStateError(
            f"its update has rank {rank}, which is as large as the weight {list(shape)} allows"
        )
