"""Words for arguments that no config takes: other libraries' options, and values of other kinds."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from lora_lightning.errors import ConfigError, did_you_mean

_VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "lora_ga_config",
    "monteclora_config", "qalora_group_size", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
# Options of PEFT's configs that have no counterpart here, and what to do instead.
_NOT_NEEDED = {
    "task_type": "An adapter sits on any module, whatever its task: leave it out, and name a new "
    "head in modules_to_save",
    "inference_mode": "Loaded adapters do not train by themselves: leave it out, or keep one as it "
    "is with LoraCallback(trainable=False)",
    "peft_type": "The config's class says the type: leave it out",
    "fan_in_fan_out": "The layout of a weight is read off its module: leave it out",
    "base_model_name_or_path": "Saved folders name the base by themselves: leave it out",
    "auto_mapping": "Saved folders need none: leave it out",
    "revision": "The base model is loaded by you, or by the task (model.revision): leave it out",
    "peft_version": "Saved folders say what they need to: leave it out",
    "megatron_config": "Megatron's layers are not supported: leave it out",
    "megatron_core": "Megatron's layers are not supported: leave it out",
    "layer_replication": "Repeated layers are not supported: repeat them in the model itself",
    "runtime_config": "An adapter lives where its layer does: leave it out",
    "ensure_weight_tying": "Tied weights are followed without it: leave it out",
} | dict.fromkeys(
    _VARIANTS,
    "This variant of PEFT's LoRA is not offered; use_rslora, use_dora and init_lora_weights are",
)
# Names that other libraries and papers give to an option.
_CALLED_ELSEWHERE = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "peft_config": "config",
    "lora_config": "config",
}


def explain_unknown(key: str, known: Collection[str]) -> str:
    """A sentence for an option that is not in `known`: what it is here, or the nearest, or all."""
    if key in _NOT_NEEDED:
        return f"{_NOT_NEEDED[key]}."
    near = _CALLED_ELSEWHERE.get(key)
    if near not in known:
        near = did_you_mean(key, known)
    return f"Did you mean {near!r}?" if near else f"Known options: {', '.join(known)}."


def check_arguments(
    owner: str, values: tuple[Any, ...], options: dict[str, Any], known: Collection[str]
) -> None:
    """Refuse what the constructor of the config `owner` does not take: it has the options `known`.

    Raises:
        ConfigError: Naming what was given, and what to write.

    """
    if values:
        first = "r" if "r" in known else next(iter(known))
        raise ConfigError(
            f"{owner}({values[0]!r}): options are given by name: {owner}({first}={values[0]!r}), "
            "for one. (lora.config)"
        )
    for key in options:
        if key not in known:
            raise ConfigError(
                f"Unknown {owner} option {key!r}. {explain_unknown(key, known)} (lora.{key})"
            )


def explain_no_config(value: Any, call: str) -> str:
    """A message for what `call` ("LoraCallback", say) was given in place of an adapter config."""
    kind = type(value)
    found = f"{call} was given {_shown(value)} where an adapter config stands"
    takes_options = "LoraCallback" if call == "LoraCallback" else "LoraConfig"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{found}. The rank is given by name: {takes_options}(r={value}). (lora.config)"
    if isinstance(value, dict):
        return f"{found}. Give its entries by name: {takes_options}(**options). (lora.config)"
    if isinstance(value, (list, tuple)):
        return f"{found}. Names of modules go by name: target_modules={value!r}. (lora.config)"
    if isinstance(value, str):
        return (
            f"{found}. A file to start from is init_from={value!r}; a name for the adapter is "
            f"adapter_name={value!r}. (lora.config)"
        )
    if isinstance(value, nn.Module):
        return (
            f"{found}. LoraCallback takes no model: trainer.fit is given it. inject_adapter(model, "
            "config) takes the model first. (lora.config)"
        )
    if isinstance(value, type):
        return f"{found}. Make one of it: {value.__name__}(). (lora.config)"
    if kind.__module__.partition(".")[0] == "peft":
        return (
            f"{found}: peft's own. This library has configs of the same names and options: "
            f"from lora_lightning import {kind.__name__}; task_type and inference_mode are not "
            "needed. (lora.config)"
        )
    return f"{found}. Make one, as LoraConfig(r=8), or give options: r=8. (lora.config)"


def _shown(value: Any) -> str:
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__module__}.{type(value).__name__}"
