"""How much an adapter changes a weight: size, singular values and rank of the update.

Dense matrices are made only where an adapter is not B A: of low-rank factors the singular values
are those of a matrix as small as the rank, R_B R_A^T with B = Q_B R_B and A^T = Q_A R_A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_lightning.adapters.adalora import AdaLoraAdapter
from lora_lightning.adapters.base import Adapter, DeltaAdapter
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.lora.linear import LowRankAdapter
from lora_lightning.adapters.vera import VeraAdapter
from lora_lightning.layers.base import AdaptedLayer, WeightView

# Relative size of what rounding alone makes of an update: of its factors in float64, and of the
# fp32 tensors of types whose start is a weight W' = W only up to rounding.
_UNMOVED_FACTORS, _UNMOVED = 1e-12, 1e-6


@dataclass(frozen=True)
class UpdateSpectrum:
    """The update D of one weight W, W' = W + D.

    Attributes:
        values: Its singular values in float64, falling. Of several matrices (experts) the i-th is
            the root of the sum of the squares of their i-th ones. Of DoRA, those of
            scaling * B A, which has the rank; its magnitudes alone give D full rank.
        norm: Frobenius norm of D.
        weight_norm: Of W; None: not known.
        limit: The most that the rank can be: of factors and shape.
        low_rank: True if `limit` comes from factors of a chosen rank.
        exact: True if `norm` comes from the factors, too.

    """

    values: Tensor
    norm: float
    weight_norm: float | None
    limit: int
    low_rank: bool
    exact: bool = True

    @property
    def relative(self) -> float | None:
        """norm / weight_norm; None where that is zero or not known."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def moved(self) -> bool:
        """False if the update is zero, but for rounding."""
        size = self.norm if self.relative is None else self.relative
        return size > (_UNMOVED_FACTORS if self.low_rank and self.exact else _UNMOVED)

    @property
    def used_rank(self) -> int:
        """`energy_rank` of the singular values; 0 of what did not move."""
        return energy_rank(self.values) if self.moved else 0

    @property
    def entropy_rank(self) -> float:
        """`entropy_rank` of the singular values; 0.0 of what did not move."""
        return entropy_rank(self.values) if self.moved else 0.0


@torch.no_grad()
def update_spectra(layer: AdaptedLayer, adapter_name: str) -> dict[str, UpdateSpectrum]:
    """The update of every weight of a layer by one adapter, by the weight's name.

    Weights that the adapter has no tensor of its own for (tied rows) are left out, and so is what
    trains in full (`copy_change`).
    """
    spectra = {}
    for name, adapter in layer.adapters[adapter_name].by_weight().items():
        if any(True for _ in adapter.parameters()):
            spectra[name] = _spectrum(adapter, WeightView(layer, name))
    return spectra


@torch.no_grad()
def copy_change(layer: AdaptedLayer, adapter_name: str) -> tuple[float, float] | None:
    """Frobenius norms of the change of a module that trains in full, and of what it was.

    All its parameters together; None where the adapter does not train it in full.
    """
    copy = layer.trained_copies().get(adapter_name)
    if copy is None:
        return None
    now = dict(copy.module.named_parameters())
    before = dict(layer.original_tensors.named_parameters())
    pairs = [(now[name].double(), before[name].double()) for name in now if name in before]
    change = sum(float((new - old).square().sum()) for new, old in pairs)
    return change**0.5, sum(float(old.square().sum()) for _, old in pairs) ** 0.5


def factor_spectrum(
    a: Tensor, b: Tensor, scaling: float, weight_norm: float | None = None
) -> UpdateSpectrum:
    """The update scaling * B A of factors A (..., k, in) and B (..., out, k)."""
    values = low_rank_singular_values(a, b, scaling)
    limit = min(a.shape[-2], a.shape[-1], b.shape[-2])
    return UpdateSpectrum(values, _norm(values), weight_norm, limit, True)


def low_rank_singular_values(a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """Singular values of scaling * B A, float64, falling; see `UpdateSpectrum` for several B A.

    Args:
        a: A (..., k, in).
        b: B (..., out, k).
        scaling: The factor in front.

    Returns:
        (min(k, in, out)).

    """
    left = torch.linalg.qr(b.detach().double())[1]
    right = torch.linalg.qr(a.detach().double().mT)[1]
    values: Tensor = torch.linalg.svdvals(left @ right.mT) * abs(scaling)
    return values if values.dim() == 1 else values.square().sum(0).sqrt()


def dense_singular_values(delta: Tensor) -> Tensor:
    """Singular values of an update as a matrix (out, the rest), float64, falling.

    Rows and columns of zeros are left out before: they change none but zeros, and of trained token
    rows, say, little else is there.
    """
    matrix = delta.detach().double().reshape(delta.shape[0], -1)
    matrix = matrix[(matrix != 0).any(1)]
    matrix = matrix[:, (matrix != 0).any(0)]
    return torch.linalg.svdvals(matrix) if matrix.numel() else torch.zeros(1, dtype=torch.float64)


def energy_rank(values: Tensor, share: float = 0.99) -> int:
    """How many singular values hold `share` of the energy: of the sum of their squares.

    The smallest n with sum of the first n squares >= share * sum of all; 0 of an update of zero.
    The best approximation of rank n is then off by at most sqrt(1 - share) of the update's norm
    (Eckart and Young 1936).
    """
    energy = values.double().square()
    total = float(energy.sum())
    if not total > 0:
        return 0
    reached = energy.cumsum(0) >= share * total * (1 - 1e-12)  # of equal ones, a rounding above
    return int(reached.int().argmax()) + 1


def entropy_rank(values: Tensor) -> float:
    """The effective rank exp(-sum p_i ln p_i) with p_i = values_i / sum of values; 0.0 of zero.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    total = values.double().sum()
    if not float(total) > 0:
        return 0.0
    p = values.double() / total
    return float(torch.special.entr(p).sum().exp())


def _spectrum(adapter: Adapter, view: WeightView) -> UpdateSpectrum:
    weight = view.base_weight()
    size = float(torch.linalg.vector_norm(weight.detach().double()))
    factors = _factors(adapter)
    if factors is None:
        delta = _dense_update(adapter, weight, view)
        values = dense_singular_values(delta)
        limit = min(delta.shape[0], delta[0].numel())
        return UpdateSpectrum(values, float(torch.linalg.vector_norm(delta)), size, limit, False)
    found = factor_spectrum(*factors, size)
    dora = isinstance(adapter.config, LoraConfig) and adapter.config.use_dora
    if dora and adapter.spec.groups == 1:
        norm = float(torch.linalg.vector_norm(_dense_update(adapter, weight, view)))
        return replace(found, norm=norm, exact=False)
    return found


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor, float] | None:
    """A, B and the factor in front; None of a type whose update is no such product."""
    if isinstance(adapter, AdaLoraAdapter):
        return adapter.lora_A * adapter.lora_E, adapter.lora_B, adapter.scaling
    if isinstance(adapter, VeraAdapter):
        a, b = adapter.matrices(adapter.vera_lambda_b.device)
        return a, adapter.vera_lambda_b[:, None] * b * adapter.vera_lambda_d, adapter.scaling
    if not isinstance(adapter, LowRankAdapter):
        return None
    a, b = adapter.factors()
    groups = adapter.spec.groups
    if groups > 1:  # each group of outputs has r / groups of the r channels
        b = torch.block_diag(*b.reshape(groups, b.shape[0] // groups, -1).unbind())
    return a, b, adapter.scaling


def _dense_update(adapter: Adapter, weight: Tensor, view: WeightView) -> Tensor:
    if isinstance(adapter, DeltaAdapter) and not isinstance(adapter, LowRankAdapter):
        return adapter.delta_weight().detach().double()
    wide = weight.detach().double()
    return adapter.transform_weight(wide, view).detach() - wide


def _norm(values: Tensor) -> float:
    return float(values.square().sum().sqrt())
