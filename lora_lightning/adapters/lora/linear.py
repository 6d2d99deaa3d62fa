"""LoRA: a trainable low-rank update of a frozen weight.

W' = W + scaling * B A,  A (r, in), B (out, r),  scaling = lora_alpha / r.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685),
section 4.1; with use_rslora the scaling is lora_alpha / sqrt(r) (Kalajdzievski 2023,
arXiv:2312.03732). Tensor names and shapes are those of PEFT's files.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterSpec, BaseWeight, Convolution, DeltaAdapter
from lora_lightning.adapters.config import (
    RankedConfig,
    check_choice,
    check_positive,
    check_probability,
)
from lora_lightning.adapters.initialization import kaiming_uniform_, normal_, zeros_
from lora_lightning.adapters.lora.init_weights import (
    START_FROM_WEIGHT,
    EvaConfig,
    LoftqConfig,
    orthogonal_factors,
)
from lora_lightning.errors import AdapterStateError, ConfigError
from lora_lightning.utilities.autocast import is_autocast
from lora_lightning.utilities.dtensor import copy_full


@dataclass(frozen=True, kw_only=True)
class LoraConfig(RankedConfig):
    """Options of a LoRA adapter; names and defaults are those of PEFT.

    h = W x + b + scaling * B A dropout(x),  scaling = lora_alpha / r, or lora_alpha / sqrt(r)
    with use_rslora.  (Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023,
    arXiv:2312.03732)

    Args:
        r: Rank of the update, 1 <= r <= min(in_features, out_features) of every adapted layer.
        lora_alpha: Numerator of the scaling; doubling it doubles the update.
        lora_dropout: Probability in [0, 1) of dropping an element of the adapter's input.
        use_rslora: Scale by lora_alpha / sqrt(r), so that large ranks keep learning.
        use_dora: Learn the length of every row of the weight apart from its direction (DoRA).
        lora_bias: Give B a bias of its own.
        init_lora_weights: true: A Kaiming-uniform, B zero (the adapter starts as a no-op);
            "gaussian": A normal with std 1/r, B zero; "orthogonal": A and B random with B A = 0;
            "pissa" (or "pissa_niter_N", faster) and "olora": from the base weight's own SVD or
            QR, less what they start with; "eva": A from what the layers read in the first
            batches, with ranks to match; "loftq": from what rounding took from the weights of a
            base in 4 or 8 bits; false: A and B both random, for tests.
        target_modules: Which modules to adapt: "all-linear" (every Linear and Conv1D but the
            output head), a list of names (whole path or its last part), or one regular
            expression over whole paths.
        target_parameters: Names of parameters to adapt beside the modules, matrices or stacks of
            them: "experts.gate_up_proj" for the fused experts of a mixture, say. To adapt only
            these, set target_modules to [].
        exclude_modules: Which of those to leave out: list of names or one regular expression.
        layers_to_transform: Only adapt the layers with these indices (target_modules as a list).
        layers_pattern: Name of the module list that layers_to_transform counts in.
        rank_pattern: Other ranks for some modules: {name or regular expression: r}.
        alpha_pattern: Other alphas for some modules: {name or regular expression: lora_alpha}.
        eva_config: Options of init_lora_weights="eva".
        loftq_config: Options of init_lora_weights="loftq", which needs them.
        trainable_token_indices: Token ids whose rows of the input embeddings train in full (and of
            a head that is tied to them); or {name of the embedding: ids}.
        modules_to_save: Modules trained in full, as a copy saved with the adapter (a new head).
        bias: Which biases train too: "none", "lora_only" (of adapted layers) or "all".

    Raises:
        ConfigError: If a value is out of range or two options contradict each other.
        RankError: If r or a rank in rank_pattern is not a positive integer.

    """

    peft_type = "LORA"
    free_to_change = RankedConfig.free_to_change | {
        "lora_dropout",
        "init_lora_weights",
        "eva_config",
        "loftq_config",
    }

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    eva_config: EvaConfig | None = None
    loftq_config: LoftqConfig | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        self._check_tokens()
        if isinstance(self.target_parameters, str):
            raise ConfigError(
                f"target_parameters is the string {self.target_parameters!r}; it is a list of "
                f"names: [{self.target_parameters!r}]. (lora.target_parameters)"
            )
        check_positive("lora_alpha", self.lora_alpha)
        check_probability("lora_dropout", self.lora_dropout)
        start = self.init_lora_weights
        if not (isinstance(start, str) and re.fullmatch(r"pissa_niter_\d+", start)):
            known = ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "loftq")
            check_choice("init_lora_weights", start, (True, False, *known))
        if isinstance(self.eva_config, dict):  # out of a file
            object.__setattr__(self, "eva_config", EvaConfig(**self.eva_config))
        if isinstance(self.loftq_config, dict):
            object.__setattr__(self, "loftq_config", LoftqConfig(**self.loftq_config))
        if (start == "loftq") != (self.loftq_config is not None):
            raise ConfigError(
                "init_lora_weights='loftq' and loftq_config, which says where the original weights "
                "are, go together. (lora.loftq_config)"
            )
        if self.eva_config is not None and start != "eva":
            raise ConfigError(
                f"eva_config is given, but init_lora_weights is {start!r}. (lora.eva_config)"
            )
        if self.lora_bias and (self.use_dora or isinstance(start, str)):
            other = "use_dora" if self.use_dora else f"init_lora_weights={start!r}"
            raise ConfigError(f"lora_bias cannot be combined with {other}. (lora.lora_bias)")
        super().__post_init__()

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        for ids in tokens.values() if isinstance(tokens, dict) else [tokens or []]:
            if isinstance(ids, (int, str)) or not all(type(i) is int for i in ids):
                raise ConfigError(
                    f"trainable_token_indices is {tokens!r}; token ids are integers. "
                    "(lora.trainable_token_indices)"
                )
            if len(set(ids)) != len(ids):
                raise ConfigError(
                    "trainable_token_indices names a token twice. (lora.trainable_token_indices)"
                )

    def _targets_something(self) -> bool:
        return bool(self.target_modules or self.trainable_token_indices or self.target_parameters)

    @property
    def starts_from_base(self) -> bool:
        """Whether A and B start from the base weight, which is compensated for."""
        start = self.init_lora_weights
        return isinstance(start, str) and start.partition("_")[0] in START_FROM_WEIGHT

    @classmethod
    def from_file_options(cls, options: dict[str, Any]) -> LoraConfig:
        """The config of PEFT's adapter_config.json.

        Raises:
            ConfigError: If the file's tensors are only a part of the adapter: what was subtracted
                from the base at the start is in no file.

        """
        start = options.get("init_lora_weights", True)
        if isinstance(start, str) and start not in ("pissa", "olora"):
            if start.startswith("pissa_niter_") or start in ("corda", "lora_ga"):
                raise ConfigError(
                    f"init_lora_weights={start!r} changed the base weight by an amount that is "
                    "not in the folder. Have PEFT convert it when saving "
                    "(path_initial_model_for_weight_conversion)."
                )
            if start not in ("gaussian", "orthogonal", "eva", "loftq"):
                raise ConfigError(
                    f"init_lora_weights={start!r} is unknown; it may have changed the base weight. "
                    "(lora.init_lora_weights)"
                )
            start = True
        options = {**options, "init_lora_weights": start}
        options |= {"eva_config": None, "loftq_config": None}
        return super().from_file_options(options)

    def file_options(self) -> dict[str, Any]:
        """What PEFT's adapter_config.json says: a rank twice as large where A and B are of 2 r."""
        # The start is history: a file says how to compute with what there is.
        options = {**super().file_options(), "init_lora_weights": True}
        options |= {"eva_config": None, "loftq_config": None}
        if self.starts_from_base:
            factor = math.sqrt(2) if self.use_rslora else 2  # so that the scaling stays the same
            options["r"] = 2 * self.r
            options["lora_alpha"] = factor * self.lora_alpha
            options["rank_pattern"] = {k: 2 * r for k, r in self.rank_pattern.items()}
            options["alpha_pattern"] = {k: factor * a for k, a in self.alpha_pattern.items()}
        return options


class LowRankAdapter(DeltaAdapter):
    """What LoRA on a linear map, a convolution and an embedding table have in common."""

    config: LoraConfig

    file_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_B_bias": "lora_B.bias",
    }

    def __init__(self, spec: AdapterSpec, largest: int) -> None:
        config: LoraConfig = spec.config
        self.r = spec.rank(largest)
        self.lora_alpha = spec.alpha(config.lora_alpha)
        root = math.sqrt(self.r) if config.use_rslora else self.r
        super().__init__(spec, self.lora_alpha / root)
        dropout = config.lora_dropout
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def update(self, x: Tensor, base: BaseWeight) -> Tensor:
        """The adapter's share of the output alone, scaling * B A x, without dropout and bias."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k) of the update scaling * B A, as matrices."""
        raise NotImplementedError

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A weight in the canonical layout as the matrix (out, in) that B A is added to."""
        return weight

    def peft_supports(self, conv: Convolution, kernel: tuple[int, ...]) -> bool:
        """Not where it dilates either: PEFT's A does not."""
        return super().peft_supports(conv, kernel) and set(conv.dilation) == {1}

    def extra_repr(self) -> str:
        """Rank and alpha, as they appear in `print(model)`."""
        return f"r={self.r}, lora_alpha={self.lora_alpha:g}"


class LoraAdapter(LowRankAdapter):
    """LoRA on a linear map: y + scaling * (B A dropout(x) + b).

    The maths run in the activation's dtype: A and B (small) are cast to it, never the activation
    (large) to theirs.

    Where A and B start from the base weight (PiSSA, OLoRA), what they start with, B0 A0, is
    subtracted as a frozen low-rank term of its own, scaling * (B A - B0 A0): the base weight
    itself stays untouched.

    Shapes:
        x (..., in), y (..., out) -> (..., out); lora_A (r, in); lora_B (out, r);
        lora_B_bias (out) with `lora_bias`; lora_A_start, lora_B_start as lora_A, lora_B.

    """

    not_in_files = frozenset({"lora_A_start", "lora_B_start"})
    lora_A_start: Tensor | None
    lora_B_start: Tensor | None

    def __init__(self, spec: AdapterSpec) -> None:
        out_features, in_features = spec.shape
        super().__init__(spec, min(spec.shape))
        self.lora_A = spec.parameter(self.r, in_features)
        self.lora_B = spec.parameter(out_features, self.r)
        self.lora_B_bias = spec.parameter(out_features) if spec.config.lora_bias else None
        starts = spec.config.starts_from_base
        for name, tensor in (("lora_A_start", self.lora_A), ("lora_B_start", self.lora_B)):
            self.register_buffer(name, torch.zeros_like(tensor.detach()) if starts else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and B as `init_lora_weights` says, unless they start from the base weight."""
        super().reset_parameters()
        start = self.config.init_lora_weights
        generator = self.spec.generator("lora_A")
        if start == "gaussian":
            normal_(self.lora_A, 1 / self.r, generator)
        else:
            kaiming_uniform_(self.lora_A, generator)
        if start is False:
            kaiming_uniform_(self.lora_B, self.spec.generator("lora_B"))
        else:
            zeros_(self.lora_B)
        if start == "orthogonal":
            self._start_with(
                *orthogonal_factors(self.r, self.spec.shape, self.spec.path, generator)
            )
        if self.lora_B_bias is not None:
            zeros_(self.lora_B_bias)

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """Whether A and B start from the base weight."""
        return self.lora_A_start is not None

    @torch.no_grad()
    def start_from_weight(self, weight: Tensor) -> None:
        """A and B from the base weight (PiSSA, OLoRA), and what they start with beside them."""
        start = str(self.config.init_lora_weights)
        factors = START_FROM_WEIGHT[start.partition("_")[0]]
        generator = self.spec.generator("lora_A")
        self._start_with(*factors(weight, self.r, self.scaling, start, generator))
        cast(Tensor, self.lora_A_start).copy_(self.lora_A)
        cast(Tensor, self.lora_B_start).copy_(self.lora_B)

    @torch.no_grad()
    def _start_with(self, a: Tensor, b: Tensor) -> None:
        copy_full(self.lora_A, a)
        copy_full(self.lora_B, b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k); k = 2 r where what they started with is subtracted."""
        if self.lora_A_start is None or self.lora_B_start is None:
            return self.lora_A, self.lora_B
        return (
            torch.cat([self.lora_A, self.lora_A_start]),
            torch.cat([self.lora_B, -self.lora_B_start], dim=1),
        )

    def file_state(self) -> dict[str, Tensor]:
        """A and B; where their start is subtracted, those of rank 2 r that say the same."""
        state = super().file_state()
        if self.lora_A_start is not None:
            for name in self.not_in_files:
                del state[name]
            a, b = self.factors()
            state["lora_A.weight"], state["lora_B.weight"] = a.detach(), b.detach()
        return state

    def cast_factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B in the dtype in which `x` is multiplied."""
        a, b = self.factors()
        if is_autocast(x):  # which casts x, A and B itself
            return a, b
        return a.to(x.dtype), b.to(x.dtype)

    def update(self, x: Tensor, base: BaseWeight) -> Tensor:
        """The product scaling * B A x."""
        a, b = self.cast_factors(x)
        return F.linear(F.linear(x, a) * self.scale(), b)

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + scaling * (B A dropout(x) + b), in y's dtype."""
        x, scale = self.lora_dropout(x), self.scale()
        a, b = self.cast_factors(x)
        hidden = F.linear(x, a)
        if isinstance(scale, float) and hidden.dtype == y.dtype:
            # One call: no output-sized temporaries for B h, for its scaling and for the sum.
            flat_y, flat_hidden = y.reshape(-1, y.shape[-1]), hidden.reshape(-1, a.shape[0])
            y = torch.addmm(flat_y, flat_hidden, b.t(), alpha=scale).view(y.shape)
        else:  # compiled: inductor fuses this; or a base that answers in a dtype of its own
            y = y + F.linear(hidden * scale, b).to(y.dtype)
        if self.lora_B_bias is not None:
            y = y + (scale * self.lora_B_bias).to(y.dtype)
        return y

    def delta_weight(self) -> Tensor:
        """scaling * B A, (out, in)."""
        a, b = self.factors()
        return self.scale() * (b @ a)

    def transform_weight(self, weight: Tensor, base: BaseWeight) -> Tensor:
        """W + scaling * B A."""
        if self.lora_B_bias is not None and base.bias is None:
            raise AdapterStateError(
                f"{self.spec.path!r} has no bias that the adapter's own (lora_bias) could be "
                "merged into. Keep the adapter unmerged. (lora.lora_bias)"
            )
        return super().transform_weight(weight, base)

    def transform_bias(self, bias: Tensor, base: BaseWeight) -> Tensor:
        """Base bias + scaling * b."""
        if self.lora_B_bias is None:
            return bias
        return bias + self.scaling * self.lora_B_bias.to(bias.dtype)
