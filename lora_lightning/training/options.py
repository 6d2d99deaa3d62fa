"""The options that a `LoraCallback` is given, beside each other and beside those of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.lora.linear import LoraConfig
from lora_lightning.engine.injection import adapters_named
from lora_lightning.errors import AdapterMismatchError, ConfigError, did_you_mean


def options_of(config: AdapterConfig) -> dict[str, Any]:
    """The options by name, the adapter's type among them."""
    return {"type": config.peft_type, **config.to_dict()}


def log_options(trainer: Any, configs: dict[str, AdapterConfig]) -> None:
    """Tell the loggers the options of every adapter, beside the module's hyperparameters."""
    if getattr(trainer, "enable_autolog_hparams", True):
        options = {name: options_of(config) for name, config in configs.items()}
        for logger in trainer.loggers:
            logger.log_hyperparams({"lora": options})


def check_options(
    config: AdapterConfig | None, options: dict[str, Any], init_from: str | None
) -> None:
    """Refuse unknown options, and options from two sources.

    Raises:
        ConfigError: Naming the option, and the nearest known one.

    """
    defaults = {field.name: field for field in dataclasses.fields(LoraConfig)}
    for key in options:
        if key not in defaults:
            own = [
                "adapter_name",
                "module",
                "init_from",
                "trainable",
                "lr",
                "nonfinite",
                "enabled",
                "autocast_adapter_dtype",
            ]
            near = did_you_mean(key, [*defaults, *own])
            hint = f"Did you mean {near!r}?" if near else f"Known options: {', '.join(defaults)}."
            raise ConfigError(f"LoraCallback has no option {key!r}. {hint} (lora.{key})")
    # jsonargparse passes every option on, mostly with its default: those were not asked for.
    asked = list(options)
    if options.keys() == defaults.keys():
        plain = LoraConfig()
        asked = [key for key in options if options[key] != getattr(plain, key)]
    if init_from is not None and (config is not None or asked):
        given = "config" if config is not None else ", ".join(asked)
        raise ConfigError(
            f"LoraCallback was given init_from={init_from!r} and also {given}: the adapter comes "
            "with its options. Leave them out. (lora.init_from)"
        )
    if config is not None and asked:
        raise ConfigError(
            f"LoraCallback was given config and also {', '.join(asked)}: two sources that may "
            "contradict. Put the options into the config, or leave the config out. (lora.config)"
        )


def check_same_adapter(
    module: nn.Module,
    root: nn.Module,
    config: AdapterConfig,
    adapter_name: str,
    autocast_adapter_dtype: bool,
) -> None:
    """An adapter that `module` carries already is the one that is asked for on `root` in it.

    Raises:
        AdapterMismatchError: If its options differ, or it sits on more than `root`.

    """
    inside = adapters_named(root, adapter_name)
    what_to_do = (
        "another adapter_name, or take the old one off with "
        f"delete_adapter(module, {adapter_name!r})."
    )
    asked = options_of(config) | {"autocast_adapter_dtype": autocast_adapter_dtype}
    for path, adapter in inside.items():
        found = options_of(adapter.config)
        found["autocast_adapter_dtype"] = adapter.autocast_adapter_dtype
        if found != asked:
            there, here = found, asked
            changed = [
                f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
                for key in {**there, **here}
                if there.get(key) != here.get(key)
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
