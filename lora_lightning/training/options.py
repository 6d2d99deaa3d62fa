"""The options that a `LoraCallback` is given, beside each other and beside those of the model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypedDict

from lightning.pytorch import Trainer
from torch import nn

from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.config_errors import explain_no_config, explain_unknown
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.lora.init_weights import EvaConfig, LoftqConfig
from lora_lightning.engine.injection import adapters_named
from lora_lightning.errors import AdapterMismatchError, ConfigError
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.utilities.is_a import is_a


class LoraOptions(TypedDict, total=False):
    """The options of `LoraConfig` with their types, for editors to complete `LoraCallback(...)`."""

    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None
    bias: Literal["none", "lora_only", "all"]
    r: int
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    init_lora_weights: bool | str
    eva_config: EvaConfig | None
    loftq_config: LoftqConfig | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    target_parameters: list[str] | None


def options_of(config: AdapterConfig) -> dict[str, Any]:
    """The options by name, the adapter's type among them."""
    return {"type": config.peft_type, **config.to_dict()}


def log_options(trainer: Trainer, callbacks: list[AdapterCallback]) -> None:
    """Log the options of every adapter, beside the module's hyperparameters."""
    if getattr(trainer, "enable_autolog_hparams", True):
        options = {c.adapter_name: options_of(c._requested_config) for c in callbacks}
        for logger in trainer.loggers:
            # TensorBoard's would add a metric, hp_metric = -1, to a run that has no other options.
            alone = is_a(logger, "TensorBoardLogger") and not getattr(logger, "hparams", None)
            logger.log_hyperparams({"lora": options}, *([{}] if alone else []))


def check_options(
    constructor: Callable[..., Any], config: object, options: dict[str, Any], init_from: str | None
) -> None:
    """Refuse unknown options, options from two sources, and what is no config (ConfigError).

    Options are the arguments of `constructor` and, one by one, those of `LoraConfig`.
    """
    if config is not None and not isinstance(config, AdapterConfig):
        raise ConfigError(explain_no_config(config, "LoraCallback"))
    defaults = {field.name: field for field in dataclasses.fields(LoraConfig)}
    own = [
        p.name
        for p in inspect.signature(constructor).parameters.values()
        if p.kind != p.VAR_KEYWORD
    ]
    for key in options:
        if key not in defaults:
            hint = explain_unknown(key, [*defaults, *own])
            raise ConfigError(f"LoraCallback has no option {key!r}. {hint} (lora.{key})")
    # jsonargparse passes every option on, mostly with its default: those were not asked for.
    asked = list(options)
    if options.keys() == defaults.keys():
        plain = LoraConfig()
        asked = [k for k in options if options[k] not in (None, getattr(plain, k))]
    if init_from is not None and (config is not None or asked):
        given = "config" if config is not None else ", ".join(asked)
        raise ConfigError(
            f"LoraCallback was given init_from={init_from!r} and also {given}: the adapter comes "
            "with its options. Leave them out. (lora.init_from)"
        )
    if config is not None and asked:
        default = {key: getattr(LoraConfig(), key, None) for key in asked}
        back = [f"--lora.{k} {'null' if v is None else v}" for k, v in default.items()]
        raise ConfigError(
            f"LoraCallback was given config and also {', '.join(asked)}: two sources that may "
            "contradict. Put the options into the config, or leave the config out; what another "
            f"config file sets goes back to its default with {' '.join(back)}. (lora.config)"
        )


def check_same_adapter(callback: AdapterCallback, module: nn.Module, root: nn.Module) -> None:
    """Raise AdapterMismatchError if the adapter has other options or sits outside of `root`."""
    adapter_name = callback.adapter_name
    inside = adapters_named(root, adapter_name)
    what_to_do = (
        "another adapter_name, or take the old one off with "
        f"delete_adapter(module, {adapter_name!r})."
    )
    asked = options_of(callback.config)
    asked["autocast_adapter_dtype"] = callback.autocast_adapter_dtype
    for path, adapter in inside.items():
        found = options_of(adapter.config)
        found["autocast_adapter_dtype"] = adapter.autocast_adapter_dtype
        if found != asked:
            changed = [
                f"{key}: {found.get(key)!r} there, {asked.get(key)!r} here"
                for key in {**found, **asked}
                if found.get(key) != asked.get(key)
            ]
            raise AdapterMismatchError(
                f"The model carries an adapter {adapter_name!r} already ({path!r}, for one), with "
                "other options:\n  " + "\n  ".join(changed) + f"\nUse the same options, "
                f"{what_to_do} (lora.adapter_name)"
            )
    known = {id(adapter) for adapter in inside.values()}
    for path, adapter in adapters_named(module, adapter_name).items():
        if id(adapter) not in known:
            raise AdapterMismatchError(
                f"The model carries an adapter {adapter_name!r} already, and on {path!r}, for one, "
                "which is outside the submodule that is to be adapted now. Use the same module, "
                f"{what_to_do} (lora.module)"
            )
