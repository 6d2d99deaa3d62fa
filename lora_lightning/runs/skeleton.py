"""A task of a run with its adapters, but without the weights of its base.

What an adapter's files say depends on names and shapes of the base alone. So the network is made
on the meta device, from its config, and a 70B's adapter is exported in the memory of the adapter.
Whether the base is the one of the run is told from its files by the checkpoint's fingerprint: from
all of their tensors, or, beyond 4 GB, from the first of each kind (of all
`layers.N.mlp.up_proj.weight`, one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn

import lora_lightning
from lora_lightning.adapters.registry import config_type_of
from lora_lightning.checkpoint.compatibility import check_values, tensor_differences
from lora_lightning.checkpoint.fingerprint import Fingerprint, base_tensors, digest
from lora_lightning.checkpoint.peft.base_model import (
    folder_target,
    grown_tables,
    head_names,
    task_type,
)
from lora_lightning.checkpoint.peft.config import made_from
from lora_lightning.checkpoint.peft.keys import also_saved_by_peft
from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import (
    KEY,
    OPTIONS,
    TASK,
    adapter_state_dict,
    load_adapter_state_dict,
    saved_keys,
)
from lora_lightning.engine.construction import BuildContext
from lora_lightning.engine.injection import adapters_named, extend_adapter
from lora_lightning.errors import LoraError
from lora_lightning.runs.build import trained_module
from lora_lightning.runs.run import Run
from lora_lightning.tasks.network import network_skeleton
from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.utilities.hub import resolve_model_path
from lora_lightning.utilities.notice import say_once

_COMPARED_WHOLE = 4 * 10**9  # bytes; what is read of a larger base would take minutes
_NETWORK = "network."  # what stands before the names of the network's tensors in a task


def adapted_module(run: Run, module: Any = None) -> Any:
    """The module of a run with its adapters on, its base on the meta device where that suffices.

    That is for the tasks of this library. Else it is `trained_module`, whose arguments and errors
    these are.
    """
    if module is None:
        try:
            found = _skeleton(run, read_adapter_checkpoint(run.checkpoint))
        except (LoraError, RuntimeError, NotImplementedError):
            found = None  # whatever it is, with the weights there will be a word for it
        if found is not None:
            return found
    return trained_module(run, module)


def _skeleton(run: Run, checkpoint: Mapping[str, Any]) -> PretrainedTask | None:
    """None where the base's weights are needed, or say something else than the checkpoint."""
    task, options = checkpoint.get(TASK), checkpoint.get(OPTIONS)
    if not (isinstance(task, str) and task in lora_lightning.__all__ and options):
        return None
    section = run.config.get("model") or {}
    path = section.get("class_path") if isinstance(section, Mapping) else section
    entries = checkpoint[KEY]["adapters"]
    odd = any(
        entry.get("peft_type", "LORA") != "LORA" or entry["config"].get("use_dora")
        for entry in entries.values()
    )
    # What PEFT has on quantised weights, only these say.
    if path not in (None, f"lora_lightning.{task}") or (options.get("quantize") and odd):
        return None
    if not options.get("pretrained", True):
        return None
    made: PretrainedTask = getattr(lora_lightning, task)(**options)
    made.network = network_skeleton(
        made.auto_class, made.model_name, made.options, **made.network_options()
    )
    shapes = {name: list(tensor.shape) for name, tensor in base_tensors(made)}
    saved: Fingerprint = checkpoint[KEY]["base"]
    shared = shapes.keys() & saved.keys()
    if not shared or any(shapes[name] != saved[name][0] for name in shared):
        return None
    if not _is_the_base(made, {name: saved[name] for name in saved if name in shared}):
        return None
    for name in entries:
        _put_on(made, checkpoint, name, repr(str(run.checkpoint)))
    return made.eval() if not any(_needs_base(made, name) for name in entries) else None


def _put_on(module: nn.Module, checkpoint: Mapping[str, Any], name: str, where: str) -> None:
    entry, tensors = checkpoint[KEY]["adapters"][name], checkpoint["state_dict"]
    config_type = config_type_of(entry.get("peft_type", "LORA"))
    config = made_from(config_type, config_type.from_dict, entry["config"], where)
    root = module.get_submodule(entry["module"])
    prefix = f"{entry['module']}." if entry["module"] else ""
    autocast = entry.get("autocast_adapter_dtype", True)
    context = BuildContext(config, name, low_cpu_mem_usage=True, autocast_adapter_dtype=autocast)
    extend_adapter(root, context)
    for adapter in adapters_named(root, name).values():
        adapter.to_empty(device="cpu")
        adapter.reset_parameters()  # buffers that no file holds
    own = adapter_state_dict(root, name)
    keys = [prefix + key for key in saved_keys(root, name)]
    shapes = dict(zip(keys, (list(tensor.shape) for tensor in own.values()), strict=True))
    differences = tensor_differences(entry["tensors"], shapes)
    if differences:
        raise LoraError(f"{where}: {differences}")
    state = {short: tensors[key] for short, key in zip(own, keys, strict=True)}
    check_values(state, own, where)
    load_adapter_state_dict(root, state, name)


def _needs_base(module: nn.Module, name: str) -> bool:
    """Whether a folder of the adapter holds tensors of the base, too."""
    model, _ = folder_target(module, name)
    copied = [
        path for path, adapter in adapters_named(model, name).items() if not adapter.by_weight()
    ]
    return bool(
        also_saved_by_peft(model, copied, head_names(task_type(model))) or grown_tables(model)
    )


def _is_the_base(task: PretrainedTask, saved: Fingerprint) -> bool:
    """Compare a part of the base's files with a fingerprint; True as well where there are none."""
    name, revision = task.model_name, task.options.revision
    path = resolve_model_path(name)
    folder = Path(path)
    if not folder.is_dir():
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
        if not any(folder.glob("*.safetensors")):
            say_once(
                f"The weights of {name!r} are not on this machine, so they are not compared with "
                "those that the adapter was trained on."
            )
            return True
    keys = [*saved]
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) > _COMPARED_WHOLE:
        kinds: dict[str, str] = {}
        for key in saved:
            kinds.setdefault(re.sub(r"\d+", "N", key), key)
        keys = [*kinds.values()]
    wanted = {key.removeprefix(_NETWORK): saved[key] for key in keys}
    compared = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in wanted.keys() & {*opened.keys()}:
                    shape, dtype, expected = wanted[key]
                    found = opened.get_tensor(key).to(getattr(torch, dtype))
                    if list(found.shape) != shape or digest(found) != expected:
                        return False
                    compared += 1
        except (SafetensorError, OSError, AttributeError, TypeError):
            return False
    return 2 * compared >= len(wanted)  # else they have other names there
