"""AdaLoRA: an update in the form of an SVD, whose rank training shares out between the modules.

W' = W + s * B diag(E) A,  A (r, in), E (r, 1), B (out, r),  s = lora_alpha / (init_r + 1e-5).

Row i of A, entry i of E and column i of B are a triplet, in the part of a singular vector, value
and vector. All modules start with `init_r` of them; `rank_allocation.py` sets the E of the least
important ones to zero, until `target_r` are left in the mean, and keeps A and B near orthogonal.

Source: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
(arXiv:2303.10512), equation 3; names, shapes, scaling and start values are those of PEFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterSpec, BaseWeight, Convolution, DeltaAdapter
from lora_lightning.adapters.config import AdapterConfig, Positive, Probability, Rank, pattern_value
from lora_lightning.adapters.initialization import constant_, normal_
from lora_lightning.errors import ConfigError, RankError
from lora_lightning.utilities.autocast import is_autocast


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(AdapterConfig):
    """Options of an AdaLoRA adapter; names and defaults are those of PEFT.

    The total rank falls from init_r to target_r per module along a cubic curve, between step tinit
    and step total_step - tfinal; then it stays. (Zhang et al. 2023, arXiv:2303.10512, section 3)

    Args:
        target_r: Mean rank of an adapted module at the end.
        init_r: Rank of every module at the start, at most min(in_features, out_features).
        tinit: Optimizer steps before the rank begins to fall.
        tfinal: Optimizer steps at the end, in which the ranks are final.
        deltaT: Optimizer steps from one allocation to the next.
        beta1: Decay, in (0, 1), of the mean sensitivity of a weight.
        beta2: Decay, in (0, 1), of the mean deviation from it.
        orth_reg_weight: Factor of mean(|A A^T - I|, |B^T B - I|) in the loss.
        total_step: Optimizer steps of the whole run; default: as many as the Trainer will do.
        lora_alpha: Numerator of the scaling; doubling it doubles the update.
        lora_dropout: Probability in [0, 1) of dropping an element of the adapter's input.
        init_lora_weights: true: A and B normal with std 0.02, E zero (the adapter starts as a
            no-op); false: all three standard normal, for tests.
        rank_pattern: Of an adapter that has been trained, which triplets of each module are left:
            {path: init_r booleans}. Its tensors have only these.

    Raises:
        ConfigError: If a value is out of range or the schedule leaves no step to allocate ranks.
        RankError: If a rank is no positive integer, or target_r exceeds init_r.

    """

    peft_type = "ADALORA"
    free_to_change = AdapterConfig.free_to_change | {
        "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        "lora_dropout", "init_lora_weights",
    }  # fmt: skip

    # Options of PEFT's LoRA that it writes into these files too, but does not look at.
    file_only = frozenset({"r", "alpha_pattern", "use_rslora"})

    target_r: Rank = 8
    init_r: Rank = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    lora_alpha: Positive = 8
    lora_dropout: Probability = 0.0
    init_lora_weights: bool = True
    rank_pattern: dict[str, list[bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_r > self.init_r:
            raise RankError(
                f"target_r={self.target_r} is more than init_r={self.init_r}: ranks only fall. "
                "Start with a larger init_r. (lora.init_r)"
            )
        _check_steps("tinit", self.tinit, 0)
        _check_steps("tfinal", self.tfinal, 0)
        _check_steps("deltaT", self.deltaT, 1)
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            if not 0 < value < 1:
                raise ConfigError(f"{key} is {value!r}; it must be between 0 and 1. (lora.{key})")
        weight = self.orth_reg_weight
        if not 0 <= weight < math.inf:
            raise ConfigError(
                f"orth_reg_weight is {weight!r}; it must be 0 or more. (lora.orth_reg_weight)"
            )
        if self.total_step is not None:
            _check_steps("total_step", self.total_step, 1)
            self.check_schedule(self.total_step)
        object.__setattr__(self, "rank_pattern", self._checked_pattern())

    def _checked_pattern(self) -> dict[str, list[bool]]:
        pattern = {}
        for key, mask in (self.rank_pattern or {}).items():
            path = re.sub(r"\.lora_E(\.[^.]+)?$", "", key)  # PEFT names the tensor
            booleans = isinstance(mask, (list, tuple)) and all(type(kept) is bool for kept in mask)
            if not booleans or len(mask) != self.init_r:
                raise RankError(
                    f"rank_pattern[{key!r}] is no list of init_r={self.init_r} booleans, which say "
                    "which triplets of the module are left. (lora.rank_pattern)"
                )
            pattern[path] = list(mask)
        return pattern

    def check_schedule(self, total_step: int) -> None:
        """Refuse a run that ends before a rank could fall.

        Raises:
            ConfigError: If tinit >= total_step - tfinal.

        """
        if self.tinit >= total_step - self.tfinal:
            raise ConfigError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of {total_step} optimizer "
                "steps in which ranks could be allocated. Lower them, or train longer. (lora.tinit)"
            )

    def with_ranks(self, ranks: Mapping[str, int]) -> AdaLoraConfig:
        """The same options with the first triplets of modules only, by path."""
        masks = {path: [i < r for i in range(self.init_r)] for path, r in ranks.items()}
        return replace(self, rank_pattern={**masks, **self.rank_pattern})

    def file_options(self) -> dict[str, Any]:
        """As PEFT needs them: it refuses a file without a number of steps."""
        options = super().file_options()
        options["total_step"] = self.total_step or self.tinit + self.tfinal + 1
        options["rank_pattern"] = {f"{k}.lora_E": m for k, m in self.rank_pattern.items()} or None
        return options


class AdaLoraAdapter(DeltaAdapter):
    """AdaLoRA on a linear map: y + s * B (E * (A dropout(x))).

    The scaling does not change with the rank, as in PEFT: what is left of an adapter acts just as
    before.

    Attributes:
        triplets: Which of the `init_r` triplets its tensors have: all, unless `rank_pattern` says
            otherwise.
        r: How many those are.

    Shapes:
        x (..., in), y (..., out) -> (..., out); lora_A (r, in); lora_E (r, 1); lora_B (out, r).

    """

    config: AdaLoraConfig

    def __init__(self, spec: AdapterSpec) -> None:
        config: AdaLoraConfig = spec.config
        super().__init__(spec, config.lora_alpha / (config.init_r + 1e-5))
        self.triplets = _triplets(spec)
        self.r = sum(self.triplets)
        self.fitted_rank = None if self.triplets == _asked_triplets(spec) else self.r
        self.lora_A = spec.parameter(self.r, math.prod(spec.shape[1:]))
        self.lora_E = spec.parameter(self.r, 1)
        self.lora_B = spec.parameter(spec.shape[0], self.r)
        dropout = config.lora_dropout
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E zero, A and B small, unless `init_lora_weights` is false."""
        super().reset_parameters()
        start = self.config.init_lora_weights
        for name in ("lora_A", "lora_B", "lora_E"):
            normal_(getattr(self, name), 0.02 if start else 1, self.spec.generator(name))
        if start:
            constant_(self.lora_E, 0)

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + s * B (E * (A dropout(x))), in y's dtype."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        x = self.lora_dropout(x)
        if not is_autocast(x):  # which casts x, A and B itself
            a, b = a.to(x.dtype), b.to(x.dtype)
        hidden = F.linear(x, a)
        values = (self.lora_E.T * self.scale()).to(hidden.dtype)
        return y + F.linear(hidden * values, b).to(y.dtype)

    def delta_weight(self) -> Tensor:
        """The product s * B diag(E) A, in the layout of the weight."""
        product = self.lora_B @ (self.lora_A * self.lora_E)
        return self.scale() * product.view(self.spec.shape)

    def extra_repr(self) -> str:
        """Rank and alpha, as they appear in `print(model)`."""
        return f"r={self.r}, lora_alpha={self.config.lora_alpha:g}"


class AdaLoraConvAdapter(AdaLoraAdapter):
    """AdaLoRA on a convolution, whose kernel counts as the matrix (out, in / groups * kernel).

    Shapes:
        x (batch, in, *size), y (batch, out, *size'); lora_A (r, in / groups * kernel);
        lora_E (r, 1); lora_B (out, r).

    """

    def peft_supports(self, conv: Convolution, kernel: tuple[int, ...]) -> bool:
        """In 2 dimensions and ungrouped."""
        return conv.dims == 2 and conv.groups == 1 and super().peft_supports(conv, kernel)

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + (delta_weight() applied to dropout(x))."""
        return DeltaAdapter.forward(self, self.lora_dropout(x), y, base)


def _triplets(spec: AdapterSpec) -> list[bool]:
    config: AdaLoraConfig = spec.config
    largest = min(spec.shape[0], math.prod(spec.shape[1:]))
    asked = _asked_triplets(spec)
    if spec.fit_rank and all(asked):  # no pattern names it
        return [i < largest for i in range(config.init_r)]
    if spec.check_rank and sum(asked) > largest:
        last = spec.path.rpartition(".")[2]
        raise RankError(
            f"init_r={config.init_r} is larger than {spec.path!r} (weight {tuple(spec.shape)}) "
            f"allows: at most {largest}. Lower init_r, leave this layer out with exclude_modules: "
            f"[{last}], or train it in full with modules_to_save: [{last}]. (lora.init_r)"
        )
    return asked


def _asked_triplets(spec: AdapterSpec) -> list[bool]:
    config: AdaLoraConfig = spec.config
    path = spec.name.rpartition(".")[0]  # of the weight, where the module has several
    pattern = config.rank_pattern
    return pattern.get(path) or pattern_value(pattern, path, [True] * config.init_r)


def _check_steps(key: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(
            f"{key} is {value!r}; it is a number of optimizer steps, at least {least}. (lora.{key})"
        )
