"""Adapters out of files onto a model, without a Trainer: PEFT folders and Lightning checkpoints.

A file is untrusted input, as a PEFT folder is: what it says is checked, and its tensors are too.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lora_lightning.adapters.config import SELECTION, AdapterConfig
from lora_lightning.adapters.registry import config_type_of
from lora_lightning.checkpoint.compatibility import check_values, tensor_differences
from lora_lightning.checkpoint.fingerprint import base_fingerprint, base_mismatch
from lora_lightning.checkpoint.moved_state import load_moved, moved_differences, without_place
from lora_lightning.checkpoint.peft.config import CONFIG, TENSORS, made_from
from lora_lightning.checkpoint.peft.file_content import exact_names
from lora_lightning.checkpoint.peft.reading import load_folders
from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import (
    KEY,
    adapter_state_dict,
    load_adapter_state_dict,
    saved_keys,
)
from lora_lightning.engine.construction import BuildContext, fitted_ranks, leave_out_unfit
from lora_lightning.engine.followers import (
    Follower,
    carry_adapters,
    find_followers,
    leave_teachers,
    take_off_unmoved,
)
from lora_lightning.engine.injection import (
    adapters_named,
    check_new_name,
    delete_adapter,
    extend_adapter,
    unchanged_on_error,
)
from lora_lightning.engine.switching import adapter_names
from lora_lightning.engine.targets.parameters import matching_parameters
from lora_lightning.engine.targets.selection import select_modules
from lora_lightning.errors import (
    AdapterMismatchError,
    AdapterStateError,
    CheckpointError,
    LoraError,
    first_few,
    warn,
)
from lora_lightning.layers.traversal import walk


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    weights_only: bool = True,
) -> list[str]:
    """Put an adapter on `model` from a PEFT folder or an adapter-only Lightning checkpoint.

    As with `inject_adapter`, the first adapter on a model is active and trainable, later ones are
    neither. Nothing is fetched from a hub. Everything is checked first: on any error the model is
    as it was before.

    What the run of a checkpoint has moved of its base (the teacher of BYOL, a centre, the states of
    metrics) is loaded, too; a warning names what `model` has no place for.

    Args:
        model: The model that the adapter was made for.
        path: The folder, or a checkpoint that a run with `LoraCallback` wrote.
        adapter_name: The name to give it. Default: "default" for a PEFT folder; the names they
            have for the adapters of a checkpoint or a folder of several.
        autocast_adapter_dtype: As of `inject_adapter`; False rounds the file's values to the
            dtype of a 16-bit base.
        weights_only: As of `torch.load`. False reads a checkpoint whose hyperparameters or states
            hold objects of classes; it can run any code that the file names, so only where you
            trust it.

    Returns:
        The names of the adapters that were loaded.

    Raises:
        CheckpointError: If the files are missing, damaged or of another kind.
        AdapterMismatchError: If the adapter does not fit the model, or uses what this library does
            not have.
        AdapterStateError: If the model already has an adapter of that name.

    """
    with unchanged_on_error(model):
        found = put_adapter_on(
            model, Path(path), adapter_name, autocast_adapter_dtype, weights_only
        )
    if found.moved:
        load_moved(model, found.moved)
    return found.names


@dataclass(frozen=True)
class FromFile:
    """What was put on a model, and what is still to be loaded: entries of `load_moved`."""

    names: list[str]
    moved: dict[str, Any] = field(default_factory=dict)


def put_adapter_on(
    model: nn.Module,
    place: Path,
    adapter_name: str | None,
    autocast_adapter_dtype: bool,
    weights_only: bool = True,
) -> FromFile:
    """`load_adapter` without the base that a checkpoint's run has moved."""
    is_file = place.exists() and not place.is_dir()
    if is_checkpoint_folder(place) or (is_file and place.name not in (CONFIG, TENSORS)):
        if place.suffix == ".safetensors":
            raise CheckpointError(
                f"{str(place)!r} holds tensors, but does not say how they act: a PEFT adapter "
                f"is loaded from a folder that holds them as {TENSORS} beside {CONFIG}."
            )
        checkpoint = read_adapter_checkpoint(place, weights_only)
        return _load_checkpoint(model, place, checkpoint, adapter_name, autocast_adapter_dtype)
    folder = place.parent if is_file else place
    return FromFile(load_folders(model, folder, adapter_name, autocast_adapter_dtype))


def _load_checkpoint(
    model: nn.Module,
    file: Path,
    checkpoint: dict[str, Any],
    adapter_name: str | None,
    autocast_adapter_dtype: bool,
) -> FromFile:
    """Put the adapters of a Lightning checkpoint on `model`, the LightningModule or its inside."""
    entries: dict[str, Any] = checkpoint[KEY]["adapters"]
    if adapter_name is None:
        wanted = {name: name for name in entries}
    elif adapter_name in entries:
        wanted = {adapter_name: adapter_name}
    elif len(entries) == 1:
        wanted = {next(iter(entries)): adapter_name}
    else:
        raise AdapterStateError(
            f"{str(file)!r} holds the adapters {sorted(entries)}, but no {adapter_name!r}."
        )
    owners = [path for name in wanted for path in _owners(entries[name], name)]
    prefix = _prefix(model, owners)
    # A model that carries adapters has teachers that do, if it has any.
    followers = [] if adapter_names(model) else find_followers(model)
    for names in wanted.items():
        _load_one(model, file, checkpoint, prefix, names, followers, autocast_adapter_dtype)
        carry_adapters(model, followers, names[1])
        _rename_carried(checkpoint, *names)
    moved = _moved(model, checkpoint, prefix, file)
    take_off_unmoved(model, moved)
    base = checkpoint[KEY]["base"]
    saved = {k.removeprefix(prefix): v for k, v in base.items() if k.startswith(prefix)}
    found = base_fingerprint(model)
    shared = saved.keys() & found.keys()
    whose = f"The adapters of {str(file)!r}"
    if not shared:
        raise AdapterMismatchError(
            f"{whose} were trained on another base model; nothing was loaded. None of its "
            f"{len(saved)} tensors is one of this {type(model).__name__}."
        )
    same = shared - moved.keys()
    text = base_mismatch(whose, model, {k: saved[k] for k in same}, {k: found[k] for k in same})
    if text:
        raise AdapterMismatchError(text)
    return FromFile(list(wanted.values()), moved)


def put_on_skeleton(model: nn.Module, file: Path, checkpoint: dict[str, Any]) -> FromFile:
    """Put the adapters of a checkpoint on the module that was trained, made without its weights.

    Nothing is compared with its base: whoever reads that has to. What the run has moved of it is
    returned by its names in `model`, without a look at what is there.
    """
    entries: dict[str, Any] = checkpoint[KEY]["adapters"]
    prefix = _prefix(model, [path for name in entries for path in _owners(entries[name], name)])
    for name in entries:
        _load_one(model, file, checkpoint, prefix, (name, name), [], True)
    owned = {key for entry in entries.values() for key in entry["tensors"]}
    moved = {key: v for key, v in checkpoint["state_dict"].items() if key not in owned}
    return FromFile([*entries], {k.removeprefix(prefix): v for k, v in moved.items()})


def _rename_carried(checkpoint: dict[str, Any], saved_name: str, name: str) -> None:
    """Give what teachers carry in a checkpoint the name that the adapter gets here."""
    state, entries = checkpoint["state_dict"], checkpoint[KEY]["adapters"]
    marker = f".adapters.{saved_name}."
    owned = {key for entry in entries.values() for key in entry["tensors"]}
    for key in [key for key in state if marker in key and key not in owned]:
        state[key.replace(marker, f".adapters.{name}.")] = state.pop(key)


def _moved(model: nn.Module, checkpoint: dict[str, Any], prefix: str, file: Path) -> dict[str, Any]:
    """What the run of a checkpoint has moved of `model`, by its names; a warning names the rest."""
    owned = {key for entry in checkpoint[KEY]["adapters"].values() for key in entry["tensors"]}
    moved = {key: v for key, v in checkpoint["state_dict"].items() if key not in owned}
    inside = {k.removeprefix(prefix): v for k, v in moved.items() if k.startswith(prefix)}
    homeless = without_place(model, inside)
    left_out = [*(k for k in moved if not k.startswith(prefix)), *(prefix + k for k in homeless)]
    if left_out:
        warn(
            f"The run of {str(file)!r} has moved {first_few(left_out)} of its base, for which this "
            f"{type(model).__name__} has no place: left out. Give the module that was trained to "
            "load all of it.",
            stacklevel=5,
        )
    found = {key: value for key, value in inside.items() if key not in homeless}
    differences = moved_differences(model, found)
    if differences:
        raise AdapterMismatchError(
            f"{str(file)!r} holds what its run has moved of the base, and here that is of another "
            "kind; nothing was loaded:\n  " + "\n  ".join(differences[:4])
        )
    return found


def _load_one(
    model: nn.Module,
    file: Path,
    checkpoint: dict[str, Any],
    prefix: str,
    names: tuple[str, str],
    followers: list[Follower],
    autocast: bool,
) -> None:
    """Put one adapter on; `names` are the one in the file and the one that it gets."""
    where, (saved_name, name) = repr(str(file)), names
    entry, tensors = checkpoint[KEY]["adapters"][saved_name], checkpoint["state_dict"]
    config_type = config_type_of(entry.get("peft_type", "LORA"))
    config = made_from(config_type, config_type.from_dict, entry["config"], where)
    root, shift = model, prefix
    of_root = f"{entry['module']}." if entry["module"] else ""  # names in config are below it
    if of_root.startswith(prefix):
        root, shift = dict(walk(model))[of_root[len(prefix) : -1]], of_root
    owners = _owners(entry, saved_name).items()
    inside = {path.removeprefix(shift): names for path, names in owners}
    # Without start values: the file has all tensors, those that A and B started with as well.
    context = BuildContext(config, name, low_cpu_mem_usage=True, autocast_adapter_dtype=autocast)
    check_new_name(root, name)
    if shift != of_root or not _selects_same(root, context, inside):
        context = _below(context, root, inside, shift.removeprefix(of_root))
    extend_adapter(root, context)
    leave_teachers(model, followers, name)
    marker, saved_marker = f"adapters.{name}.", f"adapters.{saved_name}."
    own = adapter_state_dict(root, name)
    keys = [shift + key.replace(marker, saved_marker, 1) for key in saved_keys(root, name)]
    present = {key: list(tensors[key].shape) for key in entry["tensors"]}
    shapes = [list(tensor.shape) for tensor in own.values()]
    differences = tensor_differences(present, dict(zip(keys, shapes, strict=True)))
    if differences:
        raise AdapterMismatchError(
            f"Adapter {saved_name!r} of {where} does not fit its own options or this model:\n  "
            + "\n  ".join(differences)
        )
    state = {short: tensors[key] for short, key in zip(own, keys, strict=True)}
    check_values(state, own, where)
    load_adapter_state_dict(root, state, name)


def _owners(entry: dict[str, Any], adapter_name: str) -> dict[str, set[str]]:
    """Names of the tensors of an adapter by the path of their module in the LightningModule."""
    owners: dict[str, set[str]] = {}
    for key in entry["tensors"]:
        path, _, tensor = str(key).rpartition(f".adapters.{adapter_name}.")
        if not path:  # a bias, under the name that it has in the base
            path, _, tensor = str(key).rpartition(".")
        owners.setdefault(path, set()).add(tensor)
    return owners


def _prefix(model: nn.Module, owners: list[str]) -> str:
    """Prefix to take off all `owners`, paths of modules, so that `model` has them."""
    paths = {path for path, _ in walk(model)}
    parts = owners[0].split(".")
    for skipped in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:skipped])
        if all(p.startswith(prefix) and p.removeprefix(prefix) in paths for p in owners):
            return prefix
    raise AdapterMismatchError(
        f"The checkpoint's adapters ({first_few(owners, 2)}) sit on modules that this "
        f"{type(model).__name__} does not have: give the model that was trained."
    )


def _selects_same(model: nn.Module, context: BuildContext, owners: dict[str, set[str]]) -> bool:
    """Whether the options select here what there are tensors for: a default may not.

    What is frozen in a run need not be so where its checkpoint is read.
    """
    if not context.config.names_no_module:
        return True
    try:
        selection = select_modules(model, context.config)
        leave_out_unfit(context, selection, {})
    except LoraError:
        return False
    return selection.targets.keys() - selection.parameters == _adapted(
        model, context.config, owners
    )


def _adapted(model: nn.Module, config: AdapterConfig, owners: dict[str, set[str]]) -> set[str]:
    """The modules that there are tensors of adapters for, without those adapted by parameter."""
    beside = ("bias", "trainable_tokens_delta", "module.")
    targets = {p for p, names in owners.items() if any(not n.startswith(beside) for n in names)}
    modules = {path: module for path, module in walk(model) if path}
    parameters = matching_parameters(modules, getattr(config, "target_parameters", None) or ())
    return targets - {path for path, _ in parameters.values()}


def _below(
    context: BuildContext, model: nn.Module, owners: dict[str, set[str]], prefix: str
) -> BuildContext:
    """The options for `model`, the part at `prefix` of the module whose names they use.

    What they select is what there are tensors for; `owners` as `model` names them.
    """
    config = context.config
    saved = {p for p, names in owners.items() if any(n.startswith("module.") for n in names)}
    changes: dict[str, Any] = {}
    for option in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
        value = getattr(config, option, None)
        if isinstance(value, dict):
            changes[option] = {name.removeprefix(prefix): v for name, v in value.items()}
    parameters = getattr(config, "target_parameters", None)
    if parameters:
        changes["target_parameters"] = [name.removeprefix(prefix) for name in parameters]
    changes |= dict.fromkeys(SELECTION)
    targets = _adapted(model, dataclasses.replace(config, **changes), owners)
    changes["target_modules"] = exact_names([path for path, _ in walk(model) if path], targets)
    changes["modules_to_save"] = sorted(saved) or None
    narrowed = dataclasses.replace(context, config=dataclasses.replace(config, **changes))
    if not config.names_no_module:
        return narrowed
    # Ranks that a default has lowered stand in the options from now on.
    with unchanged_on_error(model):
        extend_adapter(model, dataclasses.replace(narrowed, fit_rank=True))
    ranks = fitted_ranks(adapters_named(model, context.adapter_name))
    delete_adapter(model, context.adapter_name)
    return dataclasses.replace(narrowed, config=narrowed.config.with_ranks(ranks))
