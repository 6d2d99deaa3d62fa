"""What a user can ask of an adapter: validated once, then never changed."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_lightning.errors import ConfigError, RankError, did_you_mean

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Options of a LoRA adapter; names and defaults are those of PEFT.

    h = W x + b + scaling * B A dropout(x),  scaling = lora_alpha / r, or lora_alpha / sqrt(r)
    with use_rslora.  (Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023,
    arXiv:2312.03732)

    Args:
        r: Rank of the update, 1 <= r <= min(in_features, out_features) of every adapted layer.
        lora_alpha: Numerator of the scaling; doubling it doubles the update.
        lora_dropout: Probability in [0, 1) of dropping an element of the adapter's input.
        use_rslora: Scale by lora_alpha / sqrt(r), so that large ranks keep learning.
        init_lora_weights: true: A Kaiming-uniform, B zero (the adapter starts as a no-op);
            "gaussian": A normal with std 1/r, B zero; false: A and B both random, for tests.
        target_modules: Which modules to adapt: "all-linear" (every Linear and Conv1D but the
            output head), a list of names (whole path or its last part), or one regular
            expression over whole paths.
        exclude_modules: Which of those to leave out: list of names or one regular expression.
        layers_to_transform: Only adapt the layers with these indices (target_modules as a list).
        layers_pattern: Name of the module list that layers_to_transform counts in.
        rank_pattern: Other ranks for some modules: {name or regular expression: r}.
        alpha_pattern: Other alphas for some modules: {name or regular expression: lora_alpha}.
        modules_to_save: Modules trained in full, as a copy saved with the adapter (a new head).
        bias: Which biases train too: "none", "lora_only" (of adapted layers) or "all".

    Raises:
        ConfigError: If a value is out of range or two options contradict each other.
        RankError: If r or a rank in rank_pattern is not a positive integer.

    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    target_modules: list[str] | str = ALL_LINEAR
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    bias: Literal["none", "lora_only", "all"] = "none"

    def __post_init__(self) -> None:
        for key, rank in {"r": self.r, **_prefixed("rank_pattern", self.rank_pattern)}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise RankError(
                    f"{key} is {rank!r}; a rank is an integer of at least 1. (lora.{key})"
                )
        alphas = {"lora_alpha": self.lora_alpha, **_prefixed("alpha_pattern", self.alpha_pattern)}
        for key, alpha in alphas.items():
            if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha <= 0:
                raise ConfigError(f"{key} is {alpha!r}; it must be a number above 0. (lora.{key})")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_dropout is {self.lora_dropout!r}; it is a probability, 0 <= p < 1. "
                "(lora.lora_dropout)"
            )
        _check_choice("init_lora_weights", self.init_lora_weights, (True, False, "gaussian"))
        _check_choice("bias", self.bias, ("none", "lora_only", "all"))
        self._check_names()
        self._check_layers()
        # The caller's lists stay the caller's: ours are copies that nobody else can change.
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, (set, tuple)):  # a set has no order of its own: give it one
                value = sorted(value) if isinstance(value, set) else list(value)
            if isinstance(value, (list, dict)):
                object.__setattr__(self, spec.name, value.copy())

    def _check_names(self) -> None:
        for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, key)
            for expression in [value] if isinstance(value, str) else value or ():
                if not isinstance(value, (list, tuple, set)):  # listed names are no expressions
                    _check_expression(key, expression)
        if not self.target_modules:
            raise ConfigError(
                f"target_modules is {self.target_modules!r}: nothing would be adapted. Use "
                f"{ALL_LINEAR!r}, a list of module names, or a regular expression. "
                "(lora.target_modules)"
            )
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save is the string {self.modules_to_save!r}; it is a list of names: "
                f"[{self.modules_to_save!r}]. (lora.modules_to_save)"
            )

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str):
            for key in ("layers_to_transform", "layers_pattern"):
                if getattr(self, key) is not None:
                    raise ConfigError(
                        f"{key} cannot be combined with target_modules={self.target_modules!r}: it "
                        "only narrows a list of names. List the names, or put the layer index "
                        f"into the regular expression. (lora.{key})"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern={self.layers_pattern!r} says where to count layers, but "
                "layers_to_transform does not say which. Set both or neither. "
                "(lora.layers_to_transform)"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain Python values, as they are stored in checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> LoraConfig:
        """The config of `to_dict`; an unknown option is an error that names the nearest one."""
        known = [spec.name for spec in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                near = did_you_mean(key, known)
                hint = (
                    f" Did you mean {near!r}?" if near else f" Known options: {', '.join(known)}."
                )
                raise ConfigError(f"Unknown LoRA option {key!r}.{hint} (lora.{key})")
        return cls(**options)


def scaling(config: LoraConfig, r: int, alpha: float) -> float:
    """alpha / r, or alpha / sqrt(r) under rsLoRA."""
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def _prefixed(key: str, pattern: dict[str, Any]) -> dict[str, Any]:
    return {f"{key}[{name!r}]": value for name, value in pattern.items()}


def _check_expression(key: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"{key} {expression!r} is no regular expression: {error}. (lora.{key})"
        ) from None


def _check_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(
        value is choice or (value == choice and type(value) is type(choice)) for choice in choices
    ):
        listed = ", ".join(repr(choice) for choice in choices)
        near = did_you_mean(str(value), [c for c in choices if isinstance(c, str)])
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(f"{key} is {value!r}; known values: {listed}.{hint} (lora.{key})")
