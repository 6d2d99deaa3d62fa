"""Adapter types, one file each, and which of them a config asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_lightning.adapters.adalora import AdaLoraAdapter, AdaLoraConfig, AdaLoraConvAdapter
from lora_lightning.adapters.base import Adapter, AdapterSpec
from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.ia3 import Ia3Adapter, Ia3Config, Ia3ConvAdapter
from lora_lightning.adapters.loha import LohaAdapter, LohaConfig
from lora_lightning.adapters.lokr import LokrAdapter, LokrConfig
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.lora.conv import LoraConvAdapter
from lora_lightning.adapters.lora.dora import DoraAdapter, DoraConvAdapter, DoraEmbeddingAdapter
from lora_lightning.adapters.lora.embedding import LoraEmbeddingAdapter
from lora_lightning.adapters.lora.experts import LoraExpertsAdapter
from lora_lightning.adapters.lora.linear import LoraAdapter
from lora_lightning.adapters.oft import OftAdapter, OftConfig, OftConvAdapter, OftEmbeddingAdapter
from lora_lightning.adapters.shira import ShiraAdapter, ShiraConfig
from lora_lightning.adapters.vera import VeraAdapter, VeraConfig
from lora_lightning.errors import ConfigError, nearest_hint

# The adapter class for each kind of layer (`AdaptedLayer.kind`), or what says it for a config.
ByKind = Mapping[str, Callable[[AdapterSpec], Adapter]]

_TYPES: dict[type[AdapterConfig], Callable[[AdapterConfig], ByKind]] = {}


def register_adapter(
    config_type: type[AdapterConfig], by_kind: ByKind | Callable[[AdapterConfig], ByKind]
) -> None:
    """Make an adapter type known to `inject_adapter`, `LoraCallback` and the file format.

    Args:
        config_type: Its options; `config_type.peft_type` names it in files.
        by_kind: The class for every kind of layer that it supports, {"linear": MyAdapter}; or a
            function that says so for a config.

    Raises:
        ConfigError: If another type has the same `peft_type`.

    """
    for other in _TYPES:
        if other.peft_type == config_type.peft_type and other is not config_type:
            raise ConfigError(
                f"peft_type {config_type.peft_type!r} of {config_type.__name__} is that of "
                f"{other.__name__} already."
            )
    _TYPES[config_type] = by_kind if callable(by_kind) else lambda config: by_kind


def classes_for(config: AdapterConfig) -> ByKind:
    """The adapter class for each kind of layer that `config`'s type supports.

    Raises:
        ConfigError: If the type is not registered.

    """
    if type(config) not in _TYPES:
        raise ConfigError(
            f"{type(config).__name__} is no known adapter config; register_adapter makes it one. "
            f"Known are {', '.join(known.__name__ for known in _TYPES)}. (lora.config)"
        )
    return _TYPES[type(config)](config)


def config_types() -> dict[str, type[AdapterConfig]]:
    """The registered config types by `peft_type`."""
    return {config_type.peft_type: config_type for config_type in _TYPES}


def config_type_of(peft_type: str) -> type[AdapterConfig]:
    """The config type that files call `peft_type`.

    Raises:
        ConfigError: If there is none.

    """
    known = config_types()
    if peft_type not in known:
        hint = nearest_hint(peft_type, known) or f" Known: {', '.join(known)}."
        raise ConfigError(f"Unknown adapter type {peft_type!r}.{hint} (peft_type)")
    return known[peft_type]


def _lora_classes(config: AdapterConfig) -> ByKind:
    dora = getattr(config, "use_dora", False)
    return {
        "linear": DoraAdapter if dora else LoraAdapter,
        "conv": DoraConvAdapter if dora else LoraConvAdapter,
        "embedding": DoraEmbeddingAdapter if dora else LoraEmbeddingAdapter,
        "experts": LoraExpertsAdapter,  # which refuses use_dora by its name
    }


register_adapter(LoraConfig, _lora_classes)
register_adapter(AdaLoraConfig, {"linear": AdaLoraAdapter, "conv": AdaLoraConvAdapter})
register_adapter(LohaConfig, {"linear": LohaAdapter, "conv": LohaAdapter})
register_adapter(LokrConfig, {"linear": LokrAdapter, "conv": LokrAdapter})
register_adapter(
    OftConfig, {"linear": OftAdapter, "conv": OftConvAdapter, "embedding": OftEmbeddingAdapter}
)
register_adapter(ShiraConfig, {"linear": ShiraAdapter})
register_adapter(Ia3Config, {"linear": Ia3Adapter, "conv": Ia3ConvAdapter})
register_adapter(VeraConfig, {"linear": VeraAdapter})
