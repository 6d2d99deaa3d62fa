"""The merged model of a task of this library: a folder that plain transformers loads."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.checkpoint.state_dict import OPTIONS
from lora_lightning.engine.switching import adapter_names, set_adapter
from lora_lightning.engine.unloading import merge_and_unload
from lora_lightning.errors import ConfigError, first_few
from lora_lightning.layers.quantized.base import packed_weight
from lora_lightning.runs.build import data_of, trained_module
from lora_lightning.runs.run import Run
from lora_lightning.utilities.hub import load_pretrained
from lora_lightning.utilities.new_output import new_folder
from lora_lightning.verbs.merge import comparison
from lora_lightning.verbs.merge.layout import NotByShardsError
from lora_lightning.verbs.merge.model_folder import (
    copy_code,
    save_config,
    save_generation_config,
    save_processor,
)
from lora_lightning.verbs.merge.quantized import compute_in_float32, make_dense
from lora_lightning.verbs.merge.result import MergeResult
from lora_lightning.verbs.merge.shards import disk_named, size_in_bytes, write_shards
from lora_lightning.verbs.merge.skeleton import Skeleton
from lora_lightning.verbs.merge.tying import untie_head


@dataclass(frozen=True)
class Wanted:
    """What is asked of a merge."""

    run: Run
    checkpoint: dict[str, Any]
    adapters: list[str]
    dtype: torch.dtype | None
    dequantize: bool
    module: Any
    data: Any
    check: int
    max_shard_size: str

    def __post_init__(self) -> None:
        if self.check < 0:
            raise ConfigError(
                f"check must be 0 or more validation rows, found {self.check}. (check)"
            )


def merge_model(wanted: Wanted, result: MergeResult, force: bool) -> None:
    """Write the folder `result.out`, and take down in `result` how it was done.

    Raises:
        ConfigError: If an option does not go with the run, or the disk is full.
        AdapterMismatchError: If the base is not the one of the run.
        AdapterStateError: If the merged model would not compute the same.

    """
    limit = size_in_bytes(wanted.max_shard_size)
    quantize = wanted.checkpoint.get(OPTIONS, {}).get("quantize")
    if quantize and not wanted.dequantize:
        _check_quantized(True, False, str(quantize))
    with new_folder(result.out, force) as folder:
        skeleton, reason = _skeleton(wanted)
        task: Any = None
        if skeleton is not None:
            _check_quantized(bool(quantize), wanted.dequantize, str(quantize))
            _write_by_shards(skeleton, folder, wanted, result, limit)
            size = 4 * sum(t.numel() for t in skeleton.layout.shapes.values())
            holder = skeleton.task
            del skeleton
            free = comparison.free_memory()
            if wanted.check < 1:
                result.notes.append("not compared with the unmerged model: --check 0")
            elif free is not None and 1.3 * size > free:
                result.notes.append(
                    f"not compared with the unmerged model: it takes {size / 1e9:.1f} GB in "
                    f"float32, and {free / 1e9:.1f} GB are free; merge again where there is more"
                )
            else:
                task = trained_module(wanted.run)
        else:
            task = holder = trained_module(wanted.run, wanted.module)
            _check_quantized(_packed(task), wanted.dequantize, "few bits")
        if task is not None:
            _merge_in_memory(task, folder, wanted, result, limit if reason else None, reason)
        _write_the_rest(holder, folder, wanted, result)


def _skeleton(wanted: Wanted) -> tuple[Skeleton | None, str]:
    """What is written shard by shard; or why it cannot be."""
    if wanted.module is not None:
        return None, "the module was given (module)"
    if not wanted.checkpoint.get(OPTIONS):
        return None, "its task is not one of this library's own"
    section = wanted.run.config.get("model")
    options = (section.get("init_args") or {}) if isinstance(section, dict) else {}
    trusted = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
    file = wanted.run.checkpoint
    try:
        return Skeleton(file, wanted.checkpoint, wanted.adapters, **trusted), ""
    except NotByShardsError as reason:
        return None, str(reason)


def _write_by_shards(
    skeleton: Skeleton, folder: Path, wanted: Wanted, result: MergeResult, limit: int
) -> None:
    with torch.no_grad():
        count = write_shards(folder, skeleton.parts(wanted.dtype), limit)
    skeleton.check_complete()
    stored = wanted.dtype or skeleton.usual_dtype()
    save_config(skeleton.network, folder, stored)
    result.dtype = str(stored).removeprefix("torch.")
    of = "one shard" if count == 1 else f"{count} shards of at most {wanted.max_shard_size}"
    result.how = f"shard by shard into {of}"
    if skeleton.untied is not None:
        result.notes.append(_untied(*skeleton.untied))
    if skeleton.layout.unread:
        result.notes.append(
            f"left out, as the network has no place for it: {first_few(skeleton.layout.unread)}"
        )


def _merge_in_memory(
    task: Any, folder: Path, wanted: Wanted, result: MergeResult, limit: int | None, reason: str
) -> None:
    """Merge the model in memory, write it where there is a `limit`, and compare the answers."""
    set_adapter(task, wanted.adapters)
    network = task.network
    own = network.config.dtype  # that of the weights as they were loaded
    batches = _batches(task, wanted, result)
    # Else its tables of positions were narrowed, too, which those of the files are not.
    exact = all(b.dtype.itemsize > 2 for b in network.buffers() if b.is_floating_point())
    comparison.widen(task)
    compute_in_float32(network)
    before = comparison.scores(task, batches)
    make_dense(network)
    untied = untie_head(network, copy=True)
    if adapter_names(task):
        merge_and_unload(task)
    after = comparison.scores(task, batches)
    if batches:
        result.merged = comparison.difference(after, before)
        comparison.check_close(result.merged, "merged in float32")
        result.rows = sum(map(comparison.rows_of, batches))
    if limit is not None:
        dtype = wanted.dtype or _stored_dtype(task) or own or torch.float32
        _save(network, folder, dtype, wanted.max_shard_size)
        result.dtype = str(dtype).removeprefix("torch.")
        result.how = f"in memory as a whole, because {reason}"
        if untied is not None:
            result.notes.append(_untied(*untied))
    if batches:
        result.saved = comparison.difference(_answers_of(folder, task, batches), before)
        exact &= result.dtype in ("float32", "float64")
        comparison.check_close(result.saved, f"saved as {result.dtype}", exact)


def _answers_of(folder: Path, task: Any, batches: list[Any]) -> list[Tensor]:
    """What the model in the folder answers, loaded by plain transformers, in float32."""
    how: dict[str, Any] = {"trust_remote_code": task.options.trust_remote_code}
    if task.options.attn_implementation is not None:
        how["attn_implementation"] = task.options.attn_implementation
    config = task.network.config
    task.network = None  # of two models there is no need
    task.network = load_pretrained(task.auto_class, str(folder), dtype=torch.float32, **how)
    task.network.config.use_cache = config.use_cache
    return comparison.scores(task.eval(), batches)


def _batches(task: Any, wanted: Wanted, result: MergeResult) -> list[Any]:
    if wanted.check < 1:
        reason = "--check 0"
    else:
        try:
            data = data_of(wanted.run, wanted.data)
            found = [] if data is None else comparison.validation_batches(task, data, wanted.check)
            if found:
                task.eval()
                return found
            reason = "the run's config names no data (data)"
        except Exception as error:  # of files that may be gone
            reason = (str(error) or repr(error)).splitlines()[0]
    result.notes.append(f"not compared with the unmerged model: {reason}")
    task.eval()
    return []


def _save(network: Any, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    nn.Module.to(network, dtype)
    if network.__dict__.pop("hf_quantizer", None) is not None:
        network._weight_conversions = None  # of packed weights; those of the architecture stay
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    with disk_named():
        network.save_pretrained(folder, max_shard_size=max_shard_size)
    save_config(network, folder, dtype)


def _stored_dtype(task: Any) -> torch.dtype | None:
    """What the base's own config says of its files."""
    hub = task.options.hub()
    found: Any = load_pretrained("AutoConfig", task.model_name, **hub).dtype
    dtype: torch.dtype | None = getattr(torch, found) if isinstance(found, str) else found
    return dtype


def _write_the_rest(task: Any, folder: Path, wanted: Wanted, result: MergeResult) -> None:
    notes = [
        save_generation_config(task, wanted.checkpoint, folder),
        save_processor(task, wanted.checkpoint, wanted.run.config, folder),
    ]
    copy_code(task, folder)
    for file in folder.glob("*.safetensors"):  # which safetensors lets nobody else read
        shutil.copymode(folder / "config.json", file)
    result.notes += [note for note in notes if note]
    result.use = f"transformers.{task.auto_class}.from_pretrained({str(result.out)!r})"


def _untied(head: str, table: str) -> str:
    return f"{head!r} has a weight of its own now: it shared that of {table!r}, which is another"


def _packed(task: nn.Module) -> bool:
    return any(packed_weight(module) is not None for module in task.modules())


def _check_quantized(quantized: bool, dequantize: bool, kind: str) -> None:
    if quantized and not dequantize:
        raise ConfigError(
            f"The base of this run was rounded to {kind}, and rounding a merged weight again would "
            "round most of what the adapter learned away. Write a plain model in 16 or 32 bits, "
            "the rounded base and what was learned on it, with --dequantize; or keep base and "
            "adapter apart (lora-lightning export). (dequantize)"
        )
    if dequantize and not quantized:
        raise ConfigError(
            "The base of this run is not quantized: there is nothing to dequantize. Leave the "
            "option out. (dequantize)"
        )
