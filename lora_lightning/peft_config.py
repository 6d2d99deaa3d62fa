"""`adapter_config.json` of a PEFT folder: what it says, and what of it this library has."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

from torch import nn

from lora_lightning.adapters import config_type_of
from lora_lightning.adapters.token_rows import TiedTokenRows, TokenRows
from lora_lightning.adapters.trained_copy import TrainedCopy
from lora_lightning.config import AdapterConfig
from lora_lightning.errors import AdapterMismatchError, ConfigError
from lora_lightning.hosts.base import named_hosts, walk
from lora_lightning.hosts.conv1d import is_conv1d
from lora_lightning.injection import adapters_named

# What PEFT calls these types; PEFT refuses other names, as it must.
PEFT_TYPES = ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA", "IA3", "VERA", "TRAINABLE_TOKENS")
# Put before the type where PEFT knows it, but would compute something else from this adapter.
OWN = "LORA_LIGHTNING_"

# Keys that say nothing about what the adapter computes from its tensors.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


def describe(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The content of adapter_config.json for an adapter that is on `model`."""
    adapters = adapters_named(model, adapter_name)
    config = next(iter(adapters.values())).config
    beside = (TrainedCopy, TokenRows, TiedTokenRows)  # which have options of their own
    targets = [path for path, a in adapters.items() if not isinstance(a, beside)]
    saved = [path for path, a in adapters.items() if isinstance(a, TrainedCopy)]
    hosts = dict(named_hosts(model))
    known = config.peft_type not in PEFT_TYPES or all(
        hosts[path].peft_knows(adapters[path]) for path in targets
    )
    options = config.file_options()
    # What was selected, in so many words: PEFT's rules for "all-linear" depend on the model.
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        options[key] = None
    attentions = [path for path in targets if isinstance(hosts[path], nn.MultiheadAttention)]
    outs = {f"{path}.out_proj" for path in attentions}  # which PEFT adapts along with them
    by_module = [p for p in targets if hosts[p].kind != "experts" and p not in outs]
    for path in targets:  # PEFT adapts an out_proj without its attention, but it has no effect
        outer = path.rpartition(".")[0]
        known &= not isinstance(hosts.get(outer), nn.MultiheadAttention) or outer in attentions
    options["target_modules"] = _short_names(model, by_module)
    options["modules_to_save"] = sorted(saved) or None
    if options.get("bias") == "none" and "bias" not in _peft_fields(config):
        del options["bias"]
    base_config = getattr(model, "config", None)
    return {
        **options,
        "peft_type": config.peft_type if known else OWN + config.peft_type,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": getattr(base_config, "name_or_path", None) or None,
        "fan_in_fan_out": bool(targets) and all(is_conv1d(hosts[path]) for path in targets),
    }


def parse(options: dict[str, Any], where: str) -> AdapterConfig:
    """The config that adapter_config.json describes.

    Args:
        options: Its content.
        where: The file, for messages.

    Raises:
        AdapterMismatchError: If it is of an unknown type, or uses something that this library does
            not have: loading it anyway would compute something else.

    """
    peft_type = options.get("peft_type")
    if not isinstance(peft_type, str):
        raise AdapterMismatchError(f"{where} names no peft_type; it is no adapter's config.")
    try:
        config_type = config_type_of(peft_type.removeprefix(OWN))
    except ConfigError as error:
        raise AdapterMismatchError(f"{where}: {error}") from None
    known = {spec.name for spec in dataclasses.fields(config_type)} | config_type.file_only
    foreign = {
        key: value
        for key, value in options.items()
        if key not in known | _IGNORED and value not in (None, False, "none", [], {}, "")
    }
    if foreign:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(foreign.items()))
        raise AdapterMismatchError(
            f"{where} asks for {listed[:300]}, which lora_lightning does not have; without it the "
            "adapter would compute something else. Convert it with PEFT to a plain "
            f"{peft_type} adapter, or merge it there."
        )
    given = {key: value for key, value in options.items() if key in known}
    try:
        return config_type.from_file_options(given)
    except (TypeError, AttributeError) as error:  # a value of a type that no check expects
        raise AdapterMismatchError(f"{where} has a value of a wrong type: {error}") from None
    except ConfigError as error:
        raise AdapterMismatchError(f"{where}: {error}") from None


def _short_names(model: nn.Module, targets: list[str]) -> list[str]:
    """The last parts of the targets' paths where they select exactly the targets, else the paths.

    Short names are what other programs (vLLM, llama.cpp) look at.
    """
    by_name = defaultdict(set)
    for path, _ in walk(model):
        by_name[path.rpartition(".")[2]].add(path)
    wanted = set(targets)
    names = set()
    for path in targets:
        last = path.rpartition(".")[2]
        names.add(last if by_name[last] <= wanted and not last.isdigit() else path)
    return sorted(names)


def _peft_fields(config: AdapterConfig) -> set[str]:
    return {"bias"} if config.peft_type in ("LORA", "ADALORA", "OFT", "VERA") else set()
