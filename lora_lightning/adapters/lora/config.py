"""Options of LoRA and DoRA."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from lora_lightning.adapters.config import Positive, Probability, RankedConfig, check_choice
from lora_lightning.adapters.lora.init_weights import START_FROM_WEIGHT, EvaConfig, LoftqConfig
from lora_lightning.errors import ConfigError


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
        target_parameters: Names of parameters to adapt, matrices or stacks of them:
            "experts.gate_up_proj" for the fused experts of a mixture, say; beside the modules if
            target_modules is given, too.
        eva_config: Options of init_lora_weights="eva".
        loftq_config: Options of init_lora_weights="loftq", which needs them.
        trainable_token_indices: Token ids whose rows of the input embeddings train in full (and of
            a head that is tied to them); or {name of an embedding or head: ids}, both of which have
            to be named where they are not tied.

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

    lora_alpha: Positive = 8
    lora_dropout: Probability = 0.0
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

    def _targets_by_default(self) -> list[str] | str:
        return [] if self.target_parameters else super()._targets_by_default()

    def _targets_something(self) -> bool:
        return bool(self.target_modules or self.trainable_token_indices or self.target_parameters)

    @property
    def starts_from_base(self) -> bool:
        """True if A and B start from the base weight, which is compensated for."""
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
        history = {"init_lora_weights": start, "eva_config": None, "loftq_config": None}
        return super().from_file_options({**options, **history})

    def file_options(self) -> dict[str, Any]:
        """Return PEFT's adapter_config.json: a rank twice as large where A and B are of 2 r."""
        # The start is history: a file says how to compute with what there is.
        history = {"init_lora_weights": True, "eva_config": None, "loftq_config": None}
        options = {**super().file_options(), **history}
        if self.starts_from_base:
            factor = math.sqrt(2) if self.use_rslora else 2  # so that the scaling stays the same
            options["r"] = 2 * self.r
            options["lora_alpha"] = factor * self.lora_alpha
            options["rank_pattern"] = {k: 2 * r for k, r in self.rank_pattern.items()}
            options["alpha_pattern"] = {k: factor * a for k, a in self.alpha_pattern.items()}
        return options
