"""Options of an adapter, whatever its type: validated once, then never changed.

The options that one type alone knows stand in that type's own file under `adapters/`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from lora_lightning.adapters.config_errors import check_arguments
from lora_lightning.errors import ConfigError, RankError, nearest_hint

ALL_LINEAR = "all-linear"
ALL_LAYERS = "all-layers"
DEFAULT_TARGETS = (ALL_LINEAR, ALL_LAYERS)  # values of target_modules that name no module
# The options that say which modules are adapted; what their tensors show as facts, in a file.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

Config = TypeVar("Config", bound="AdapterConfig")
Ranked = TypeVar("Ranked", bound="RankedConfig")

# Types of options that say what is checked of a value (`_CHECKS`).
Rank = int
Positive = float
Probability = float


class KnownArguments:
    """Names the nearest option where a config is given an argument that there is not.

    It is no dataclass: jsonargparse takes subclasses (`class_path`) where a class is asked for that
    has such a base, under any LightningCLI.
    """

    if not TYPE_CHECKING:  # which sees the options in `__init__`

        def __new__(cls, *values: Any, **options: Any) -> KnownArguments:
            """Refuse arguments that there are not in more words than `__init__` would."""
            known = [spec.name for spec in dataclasses.fields(cls)]
            check_arguments(cls.__name__, values, options, known)
            return super().__new__(cls)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(KnownArguments):
    """Which modules an adapter sits on, and what trains beside it; names as in PEFT.

    Args:
        target_modules: Which modules to adapt: "all-linear" (every Linear and Conv1D), "all-layers"
            (convolutions, embeddings and attentions, too: all that the adapter's type can sit on),
            a list of names (whole path or its last part), or one regular expression over whole
            paths. The first two leave out the output head and what was frozen before, and lower a
            rank to what a small layer allows. Default: "all-linear", or none if target_parameters
            are given.
        exclude_modules: Which of those to leave out: list of names or one regular expression.
        layers_to_transform: Only adapt the layers with these indices (target_modules as a list).
        layers_pattern: Name of the module list that layers_to_transform counts in.
        modules_to_save: Modules trained in full, and saved with the adapter (a new head).
        bias: Which biases train too: "none", "lora_only" (of adapted layers) or "all".

    Raises:
        ConfigError: If a value is out of range or two options contradict each other.
        RankError: If a rank is not a positive integer.

    """

    peft_type: ClassVar[str]
    # Options that may change between saving and loading: they do not change what the saved tensors
    # compute, or the tensors themselves show the difference.
    free_to_change: ClassVar[frozenset[str]] = frozenset({*SELECTION, "modules_to_save"})

    # Of PEFT's files: options that only they know, tensors without a module's path, and what
    # bias="lora_only" is called.
    file_only: ClassVar[frozenset[str]] = frozenset()
    shared_file_keys: ClassVar[frozenset[str]] = frozenset()
    file_bias: ClassVar[str] = "lora_only"

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "lora_only", "all"] = "none"

    def __post_init__(self) -> None:
        if self.target_modules is None:
            object.__setattr__(self, "target_modules", self._targets_by_default())
        check_choice("bias", self.bias, ("none", "lora_only", "all"))
        for spec in dataclasses.fields(self):
            check = _CHECKS.get(str(spec.type))
            if check is not None:
                check(spec.name, getattr(self, spec.name))
        self._check_names()
        self._check_layers()
        # The caller's lists stay the caller's: ours are copies that nobody else can change.
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, (set, tuple)):  # a set has no order of its own: give it one
                value = sorted(value) if isinstance(value, set) else list(value)
            if isinstance(value, (list, dict)):
                object.__setattr__(self, spec.name, copy.deepcopy(value))

    def _targets_by_default(self) -> list[str] | str:
        return ALL_LINEAR

    def _targets_something(self) -> bool:
        return bool(self.target_modules)

    def _check_names(self) -> None:
        for key in ("target_modules", "exclude_modules"):
            expression = getattr(self, key)
            if isinstance(expression, str):  # listed names are no expressions
                check_expression(key, expression)
        if not self._targets_something():
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

        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            names = getattr(self, key)
            wrong = [n for n in names if not isinstance(n, str)] if names else []
            if wrong:
                raise ConfigError(
                    f"{key} lists {wrong[0]!r}; names are strings: {str(wrong[0])!r}. (lora.{key})"
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
        patterns = self.layers_pattern or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            check_expression("layers_pattern", pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern={self.layers_pattern!r} says where to count layers, but "
                "layers_to_transform does not say which. Set both or neither. "
                "(lora.layers_to_transform)"
            )

    @property
    def names_no_module(self) -> bool:
        """True if `target_modules` is "all-linear" or "all-layers": a kind, not modules."""
        return self.target_modules in DEFAULT_TARGETS

    def with_ranks(self: Config, ranks: Mapping[str, int]) -> Config:
        """The same options with ranks of their own for modules, by path."""
        return self

    @property
    def starts_from_base(self) -> bool:
        """True if what the adapter computes depends on start values taken from the base weight."""
        return False

    def prepare(
        self, shapes: Mapping[str, Sequence[tuple[int, ...]]], known: Mapping[str, Any]
    ) -> Any:
        """Check the options against all that they select; what the adapters share, if anything.

        Args:
            shapes: Of the weights of every module that is about to get an adapter, by its path.
            known: The adapters of the same name that are on the model already, by path.

        Returns:
            `AdapterSpec.shared` of the new adapters.

        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """The options as plain Python values, as they are stored in checkpoints."""
        return dataclasses.asdict(self)

    def file_options(self) -> dict[str, Any]:
        """The options as PEFT's adapter_config.json has them."""
        return {**self.to_dict(), "bias": self.bias.replace("lora_only", self.file_bias)}

    @classmethod
    def from_file_options(cls: type[Config], options: dict[str, Any]) -> Config:
        """The config that PEFT's adapter_config.json describes; unknown options are refused."""
        options = {key: value for key, value in options.items() if key not in cls.file_only}
        if options.get("bias") == cls.file_bias:
            options["bias"] = "lora_only"
        return cls.from_dict(options)

    @classmethod
    def from_dict(cls: type[Config], options: dict[str, Any]) -> Config:
        """The config of `to_dict`; an unknown option is an error that names the nearest one."""
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class RankedConfig(AdapterConfig):
    """Adapters of a rank r, which can differ by module.

    Args:
        r: Rank of the update.
        rank_pattern: Other ranks for some modules: {name or regular expression: r}.
        alpha_pattern: Other alphas for some modules: {name or regular expression: alpha}.

    """

    r: Rank = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in ("rank_pattern", "alpha_pattern"):
            if getattr(self, option) is None:  # an empty entry in a YAML file
                object.__setattr__(self, option, {})
            for name, value in getattr(self, option).items():
                check_expression(option, name)
                check = check_rank if option == "rank_pattern" else check_positive
                check(f"{option}[{name!r}]", value)
        super().__post_init__()

    def with_ranks(self: Ranked, ranks: Mapping[str, int]) -> Ranked:
        """The same options with ranks of their own for modules, by path."""
        pattern = {f"^{re.escape(path)}": r for path, r in ranks.items()}
        return dataclasses.replace(self, rank_pattern={**pattern, **self.rank_pattern})


def check_rank(key: str, value: object) -> None:
    """A rank is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RankError(f"{key} is {value!r}; a rank is an integer of at least 1. (lora.{key})")


def check_positive(key: str, value: object) -> None:
    """A finite number above 0."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{key} is {value!r}; it must be a number above 0. (lora.{key})")


def check_probability(key: str, value: object) -> None:
    """The probability of dropping something: 0 <= p < 1."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{key} is {value!r}; it is a probability, 0 <= p < 1. (lora.{key})")


def check_expression(key: str, expression: str) -> None:
    """A string that compiles as a regular expression."""
    try:
        re.compile(expression)
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"{key} {expression!r} is no regular expression: {error}. (lora.{key})"
        ) from None


def check_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    """One of the known values."""
    if (type(value), value) not in [(type(choice), choice) for choice in choices]:  # 1 is not True
        listed = ", ".join(repr(choice) for choice in choices)
        hint = nearest_hint(str(value), [c for c in choices if isinstance(c, str)])
        raise ConfigError(f"{key} is {value!r}; known values: {listed}.{hint} (lora.{key})")


def _check_bool(key: str, value: object) -> None:
    check_choice(key, value, (True, False))  # "no" and "false" would count as true


_CHECKS = {
    "bool": _check_bool,
    "Rank": check_rank,
    "Positive": check_positive,
    "Probability": check_probability,
}


def pattern_value(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key of `pattern` that fits the end of `path` (PEFT's rule)."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
