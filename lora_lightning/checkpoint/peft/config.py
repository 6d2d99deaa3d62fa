"""`adapter_config.json` of a PEFT folder as it is read, and what of it this library has."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lora_lightning.adapters.config import SELECTION, AdapterConfig
from lora_lightning.adapters.registry import config_type_of
from lora_lightning.errors import AdapterMismatchError, LoraError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MADE_FOR = "lora_lightning.module"  # in the metadata of TENSORS: a path in what it was saved from

# What PEFT calls these types; PEFT refuses other names, as it must.
PEFT_TYPES = ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA", "IA3", "VERA")
WITH_BIAS = ("LORA", "ADALORA", "OFT", "VERA")  # whose PEFT configs have the option `bias`
# Put before the type where PEFT knows it, but would compute something else from this adapter.
OWN = "LORA_LIGHTNING_"
MIX = OWN + "MIX"  # the peft_type of a folder of folders
TOKENS = "TRAINABLE_TOKENS"  # PEFT's type for trained rows alone; here an option of LORA

LARGEST_NUMBER = 2**31  # of any option; float32 can hold what is computed from it

# The last one whose nn.MultiheadAttention acts with W + 2 s B A on out_proj: in its forward, and
# merged (huggingface/peft#3774).
TWICE_UP_TO = "0.21.2"

# Keys that cannot change what is computed from the tensors of a file.
_BOOKKEEPING = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "swift_type",
    "task_type",
}
# How the adapter started. Where a start changed the base, init_lora_weights says so until PEFT has
# converted the tensors; its options stay behind.
_START = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
# How it was trained: in which dtype, by which step, with which layers of Megatron-LM.
_TRAINING = {
    "ensure_weight_tying",
    "lora_dtype",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    "loraplus_lr_embedding",
    "loraplus_lr_ratio",
    "megatron_config",
    "megatron_core",
    "merge_weights",
}
# Of how PEFT holds the base, or of an option that is off.
_STORAGE = {"fan_in_fan_out", "qalora_group_size", "runtime_config"}
_IGNORED = _BOOKKEEPING | _START | _TRAINING | _STORAGE


def adds_twice(options: dict[str, Any]) -> bool:
    """True if the PEFT that a folder was written by, or for, adds the update of out_proj twice."""
    if str(options.get("peft_type")).startswith(OWN):
        return False
    version = options.get("peft_version")
    if not isinstance(version, str):
        return "auto_mapping" in options  # PEFT's own, of before it said its version
    found = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", version)
    last = tuple(map(int, TWICE_UP_TO.split(".")))
    return found is not None and tuple(int(part or 0) for part in found.groups()) <= last


def parse(options: dict[str, Any], where: str) -> AdapterConfig:
    """The config that `options`, the content of adapter_config.json, describe.

    Raises:
        AdapterMismatchError: If it is of an unknown type, or uses something that this library does
            not have: loading it anyway would compute something else.

    """
    peft_type = options.get("peft_type")
    if not isinstance(peft_type, str):
        raise AdapterMismatchError(f"{where} names no peft_type; it is no adapter's config.")
    if peft_type == TOKENS:
        peft_type = "LORA"
        options = {
            k: v for k, v in options.items() if k not in ("token_indices", "init_weights")
        } | {"trainable_token_indices": options.get("token_indices")}
    try:
        config_type = config_type_of(peft_type.removeprefix(OWN))
    except LoraError as error:
        raise AdapterMismatchError(f"{where}: {error}") from None
    known = {spec.name for spec in dataclasses.fields(config_type)} | config_type.file_only
    foreign = {
        key: value
        for key, value in options.items()
        if key not in known | _IGNORED and not _is_off(value)
    }
    if foreign:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(foreign.items()))
        raise AdapterMismatchError(
            f"{where} asks for {listed[:300]}, which lora_lightning does not have; without it the "
            "adapter would compute something else. Convert it with PEFT to a plain "
            f"{peft_type} adapter, or merge it there."
        )
    given = {key: value for key, value in options.items() if key in known - {*SELECTION}}
    return made_from(config_type, config_type.from_file_options, given, where)


def _is_off(value: Any) -> bool:
    """True if a value asks for nothing; an option of options, if none of them asks for anything."""
    if isinstance(value, dict):
        return all(map(_is_off, value.values()))
    return value in (None, False, [], "") or (isinstance(value, str) and value.lower() == "none")


def made_from(
    config_type: type[AdapterConfig],
    make: Callable[[dict[str, Any]], AdapterConfig],
    options: dict[str, Any],
    where: str,
) -> AdapterConfig:
    """The config that `make` makes from options out of a file, whose values can be anything.

    Raises:
        AdapterMismatchError: If a value is of a wrong type, out of range, or an expression that
            could take for ever.

    """
    hints = get_type_hints(config_type)
    usable = {}
    for key, value in options.items():
        if key in hints and not _fits(value, hints[key]):
            if value is None:  # PEFT's "not set"
                continue
            raise AdapterMismatchError(
                f"{where}: {key} is {reprlib.repr(value)}, but it must be of the type "
                f"{_spelled(hints[key])}, with numbers below 2^31."
            )
        usable[key] = value
    for key in ("rank_pattern", "alpha_pattern"):
        for expression in usable.get(key) or ():
            if is_costly(expression):
                raise AdapterMismatchError(
                    f"{where}: the expression {reprlib.repr(expression)} in {key} could take for "
                    "ever to match. Write whole names of modules instead."
                )
    try:
        return make(usable)
    except LoraError as error:
        raise AdapterMismatchError(f"{where}: {error}") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise AdapterMismatchError(f"{where} has a value that cannot be used: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """True if a value out of JSON is of a type as annotated; numbers are finite and not huge."""
    inner = get_args(hint)
    kind = get_origin(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if kind is list:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if hint in (int, float):
        right = isinstance(value, (int, float) if hint is float else int)
        return right and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER
    if kind is None and isinstance(hint, type) and not dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    return True  # what the config itself checks


def is_costly(expression: str) -> bool:
    """True if `re` could need exponential time, or a long one, for a path of a hundred characters.

    Each unlimited repetition multiplies the time by the path's length, each alternative may double
    it, and a repeated group can do worse.
    """
    return bool(
        len(expression) > 1000
        or re.search(r"\)[*+{]", expression)
        or len(re.findall(r"[*+{]", expression)) > 3
        or len(re.findall(r"[?|]", expression)) > 16
    )


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def is_folder_name(name: str) -> bool:
    """True if `name` is the name of a folder inside another one, and no path that leads out."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")
