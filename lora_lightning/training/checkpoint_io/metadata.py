"""The metadata of a Lightning checkpoint with adapters, and the check that it fits the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lora_lightning
from lora_lightning.checkpoint.compatibility import (
    config_differences,
    not_finite,
    tensor_differences,
)
from lora_lightning.checkpoint.fingerprint import (
    Fingerprint,
    base_fingerprint,
    base_mismatch,
    fingerprint_difference,
)
from lora_lightning.checkpoint.moved_state import moved_differences, without_place
from lora_lightning.checkpoint.state_dict import FORMAT, KEY
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.injection import check_unmerged
from lora_lightning.errors import AdapterMismatchError, CheckpointError, first_few
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.checkpoint_io.baseline import Baseline
from lora_lightning.training.checkpoint_io.trained_state import trained_state
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.module_state import module_state
from lora_lightning.training.resume.run_state import add_run_state
from lora_lightning.training.strategies.fsdp2 import is_fsdp, is_model_parallel
from lora_lightning.utilities._torch import is_flattened
from lora_lightning.utilities.wrappers import plain_name

# Of a checkpoint: what Lightning goes on from
_NEEDED = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"}
_NEEDED |= {"epoch", "global_step", "pytorch-lightning_version"}


def reduce_checkpoint(
    checkpoint: dict[str, Any],
    module: LightningModule,
    callbacks: list[AdapterCallback],
    before: Mapping[str, Any] | None = None,
) -> None:
    """Leave only what training changed in `checkpoint["state_dict"]`, and add the metadata.

    `before` is the checkpoint as it was before the module's own hook, which can take nothing away
    that a run goes on from.
    """
    before = checkpoint if before is None else before
    adapters: dict[str, dict[str, Any]] = {
        callback.adapter_name: {
            "peft_type": callback.config.peft_type,
            "config": callback.config.to_dict(),
            "autocast_adapter_dtype": callback.autocast_adapter_dtype,
            "module": callback.module or "",
            "tensors": callback._saved_keys(module),
        }
        for callback in callbacks
    }
    checkpoint |= {key: before[key] for key in _NEEDED & before.keys() - checkpoint.keys()}
    checkpoint |= _states(module, before)
    checkpoint[KEY] = {
        "format": FORMAT,
        "version": lora_lightning.__version__,
        "adapters": adapters,
        "base": module_state(module).base_fingerprint,
    }
    if "optimizer_states" in checkpoint:  # absent with save_weights_only: nothing to resume then
        add_run_state(checkpoint, module)
        for callback in callbacks:
            adapters[callback.adapter_name]["rank_allocation"] = callback._rank_allocation()


def _states(module: LightningModule, before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The states of the module in a checkpoint, with what callbacks have put in their place."""
    handed, module_state(module).handed = module_state(module).handed, None
    state = trained_state(module) if handed is None or not handed.trained else handed.state
    exchanged: dict[str, Any] = {}
    if handed is not None:
        # By identity: the module's hook, which may cast or copy all of it, comes later.
        exchanged = {
            plain_name(key): value
            for key, value in before["state_dict"].items()
            if value is not handed.state.get(key)
        }
    # Biases of adapters that do not act: the module shows the base's own.
    hidden = {name for name, _, record in trained_biases(module) if not record.shown}
    states = {
        "state_dict": {
            key: exchanged.get(key, value) if key not in hidden else value
            for key, value in state.items()
        }
    }
    if "current_model_state" in before:  # WeightAveraging, whose averages are in "state_dict"
        states["current_model_state"] = state
    return states


def check_checkpoint(
    checkpoint: dict[str, Any], module: LightningModule, callbacks: list[AdapterCallback]
) -> None:
    """Refuse a checkpoint that does not belong to this run, before anything is loaded.

    CheckpointError if it is no adapter checkpoint of ours, AdapterMismatchError if adapters,
    options, tensors or the base model differ.
    """
    state = {plain_name(k): v for k, v in checkpoint.get("state_dict", {}).items()}
    _check_kind(checkpoint, module, callbacks, state)
    metadata = checkpoint[KEY]
    check_unmerged(module)
    # What has moved in the file's run is in the file.
    owned = {key for entry in metadata["adapters"].values() for key in entry["tensors"]}
    moved = {key: value for key, value in state.items() if key not in owned}
    saved_base, own_base = (
        {name: entry for name, entry in base.items() if name not in moved}
        for base in (metadata["base"], module_state(module).base_fingerprint or {})
    )
    # First what both bases have: where that differs, adapters differ as a consequence only.
    shared = saved_base.keys() & own_base.keys()
    _check_base({k: saved_base[k] for k in shared}, {k: own_base[k] for k in shared}, module)
    differences = _adapter_differences(metadata["adapters"], state, module, callbacks)
    if differences:
        raise AdapterMismatchError(
            "The checkpoint's adapters are not those of this run; nothing was loaded.\n  "
            + "\n  ".join(differences)
            + "\nUse the options that the checkpoint was trained with, or start a new run without "
            "ckpt_path."
        )
    _check_base(saved_base, own_base, module)
    _check_moved(module, moved)
    _warn_where_not_finite(state, owned)


def _warn_where_not_finite(state: Mapping[str, Tensor], owned: Collection[str]) -> None:
    if diverged := not_finite(state, owned):
        rank_zero_warn(
            f"This checkpoint holds values that are not finite (NaN or infinity) in "
            f"{first_few(diverged)}: the run that wrote it had diverged, and what is computed with "
            "it will not be finite either. Take an earlier checkpoint. (ckpt_path)"
        )


def _check_kind(
    checkpoint: dict[str, Any],
    module: LightningModule,
    callbacks: list[AdapterCallback],
    state: Mapping[str, Any],
) -> None:
    """Raise CheckpointError if this is no adapter checkpoint that the run could go on from."""
    metadata = checkpoint.get(KEY)
    if metadata is None:
        own = {key for callback in callbacks for key in callback._saved_keys(module)}
        keys = map(plain_name, nn.Module.state_dict(module))
        base = [key for key in keys if key not in own]
        if base and all(key in state for key in base):
            raise CheckpointError(
                "This is a full-model checkpoint (it holds the base model's "
                f"{len(base)} tensors), but LoraCallback resumes from adapter checkpoints. To "
                "start from these weights, load them into the module before fit: "
                "module.load_state_dict(torch.load(path)['state_dict']); then train without "
                "ckpt_path. (ckpt_path)"
            )
        raise CheckpointError(
            "This checkpoint was not written with LoraCallback: it has no 'lora_lightning' entry. "
            f"It holds {sorted(checkpoint)}. (ckpt_path)"
        )
    trainer = module.trainer
    if trainer.state.fn == "fit" and "optimizer_states" not in checkpoint:
        raise CheckpointError(
            "This checkpoint holds weights only (save_weights_only=True): there is no optimizer "
            "state that fit could resume from. To start a new run from its adapters, give its path "
            "to LoraCallback(init_from=...) in place of ckpt_path. (lora.init_from)"
        )
    if metadata["format"] > FORMAT:
        raise CheckpointError(
            f"This checkpoint has format {metadata['format']}, written by lora_lightning "
            f"{metadata['version']}; this is {lora_lightning.__version__}, which reads up to "
            f"format {FORMAT}. Update lora_lightning. (ckpt_path)"
        )


def _check_moved(module: LightningModule, moved: Mapping[str, Any]) -> None:
    """Raise AdapterMismatchError where what a checkpoint's run has moved has no place here."""
    lines = moved_differences(module, moved)
    if lines:
        raise AdapterMismatchError(
            "The checkpoint holds what the module has moved of its base, and here that is of "
            "another kind; nothing was loaded:\n  " + "\n  ".join(lines[:4]) + "\nMake the "
            "module as it was made for that run. (model)"
        )
    lost = module_state(module).baseline.cannot_restore(module, moved)
    if lost:
        raise AdapterMismatchError(
            f"The module has moved {first_few(lost)} of its base since the checkpoint was written, "
            "and nobody has kept what was there: the checkpoint does not hold what had not moved "
            "yet. Make the module anew, and load the checkpoint into that. (ckpt_path)"
        )


def _check_base(saved: Fingerprint, own: Fingerprint, module: nn.Module) -> None:
    text = base_mismatch("The checkpoint's adapters", module, saved, own)
    if text:
        raise AdapterMismatchError(text)


def expect_only_adapters(module: nn.Module) -> None:
    """Accept a missing base in the next strict `load_state_dict`.

    `check_checkpoint` has compared the file tensor by tensor; all that can be missing is the base.
    """

    def forgive(_: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys.clear()
        handle.remove()

    handle = module.register_load_state_dict_post_hook(forgive)


def remember_base(module: LightningModule, fresh: bool) -> None:
    """Take the base's fingerprint; again at each setup, as its weights may have been exchanged.

    `fresh` is True if the module carried no adapter before; what was remembered is void then.
    """
    remembered = module_state(module)
    if remembered.base_on_meta:
        remembered.base_fingerprint = {}
        return
    if any(map(is_flattened, module.parameters())):
        return  # FSDP1 has spread it over the processes as it was
    found = base_fingerprint(module)
    known = {} if fresh else remembered.base_fingerprint or {}
    if not known:
        remembered.baseline = Baseline()
    exchanged = remembered.baseline.remember(module)
    # What has moved is what training made of it, and another dtype is the Trainer's own cast.
    found |= {n: known[n] for n in known.keys() & found.keys() if n not in exchanged}
    remembered.base_fingerprint = _agreed(found, module)


def _agreed(own: Fingerprint, module: LightningModule) -> Fingerprint:
    """The fingerprint of rank 0, whose base DDP hands to all; sharding takes parts of each.

    AdapterMismatchError if parts of different bases would be put together.
    """
    strategy: Any = module.trainer.strategy
    first: Fingerprint = strategy.broadcast(own)
    sharded = is_model_parallel(strategy) or (
        is_fsdp(strategy) and not strategy.kwargs.get("sync_module_states")
    )
    if sharded:
        others = [None] * strategy.world_size
        torch.distributed.all_gather_object(others, fingerprint_difference(first, own)[:4])
        for rank, lines in enumerate(others):
            if lines:
                raise AdapterMismatchError(
                    f"The base of rank {rank} is not that of rank 0, and sharding would put parts "
                    "of both together:\n  " + "\n  ".join(lines) + "\nLoad the same weights on "
                    "every process, or use the same seed (seed_everything). (model)"
                )
    return first


def _adapter_differences(
    saved: dict[str, Any],
    state: dict[str, Any],
    module: LightningModule,
    callbacks: list[AdapterCallback],
) -> list[str]:
    names = [callback.adapter_name for callback in callbacks]
    lines = [f"adapter {name!r}: only in the checkpoint" for name in saved if name not in names]
    for callback in callbacks:
        name = callback.adapter_name
        if name not in saved:
            lines.append(f"adapter {name!r}: not in the checkpoint, which has {sorted(saved)}")
            continue
        expected = callback._saved_keys(module)
        stated = saved[name]["tensors"]
        there, here = saved[name].get("peft_type", "LORA"), callback.config.peft_type
        if there != here:
            lines.append(f"adapter {name!r}: {there} in the checkpoint, {here} here (lora.config)")
            continue
        found = [*config_differences(saved[name]["config"], callback.config)]
        was = saved[name].get("autocast_adapter_dtype", True)
        if was != callback.autocast_adapter_dtype:
            found.append(
                f"autocast_adapter_dtype: {was} in the checkpoint, {not was} here "
                "(lora.autocast_adapter_dtype)"
            )
        found += tensor_differences(stated, expected)
        if not found:  # the file's own tensors against its own statement: damage, not options
            present = {key: list(state[key].shape) for key in stated if key in state}
            found += tensor_differences(present, expected)
        lines += [f"adapter {name!r}: {line}" for line in found]
    owned = {key for entry in saved.values() for key in entry["tensors"]}
    unowned = without_place(module, state.keys() - owned)
    if unowned and not lines:
        lines.append(f"tensors that no adapter owns: {first_few(unowned)}")
    return lines
