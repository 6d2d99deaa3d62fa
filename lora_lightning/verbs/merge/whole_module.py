"""The merged checkpoint of a LightningModule of one's own: what Lightning writes without adapters.

`load_from_checkpoint` of the module's class reads it, and needs nothing of this library.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.checkpoint.moved_state import tensor_places
from lora_lightning.checkpoint.state_dict import KEY, OPTIONS, TASK
from lora_lightning.engine.unloading import merge_and_unload
from lora_lightning.errors import AdapterStateError, ConfigError
from lora_lightning.layers.quantized.base import packed_weight
from lora_lightning.utilities.atomic_write import sync_directory
from lora_lightning.utilities.new_output import check_new_file
from lora_lightning.verbs.merge.comparison import (
    check_close,
    difference,
    rows_of,
    scores,
    validation_batches,
    widen,
)
from lora_lightning.verbs.merge.result import MergeResult

# Of the run, and of no use without its optimizer and callbacks; and what is ours.
_LEFT_OUT = {
    KEY, OPTIONS, TASK, "state_dict", "current_model_state", "optimizer_states", "lr_schedulers",
    "loops", "callbacks", "MixedPrecision", "native_amp_scaling_state",
}  # fmt: skip


def merge_module(
    module: Any, checkpoint: dict[str, Any], result: MergeResult, data: Any, check: int,
    dtype: torch.dtype | None, force: bool,
) -> None:  # fmt: skip
    """Merge the active adapters into `module`, and write its checkpoint to `result.out`.

    Raises:
        AdapterStateError: If the merged module would not compute the same.

    """
    quantized = [path for path, part in module.named_modules() if packed_weight(part) is not None]
    if quantized:
        raise AdapterStateError(
            f"{quantized[0]!r} and {len(quantized) - 1} other layers hold weights in few bits, as "
            f"{type(module).__name__} makes them: rounding again would round most of what the "
            "adapters learned away. Export the adapters instead (lora_lightning.save_adapter), or "
            "train on a module without quantization. (dequantize)"
        )
    own = {key: getattr(*place) for key, place in tensor_places(module).items()}
    dtypes = {key: dtype or t.dtype for key, t in own.items() if _is_number(t)}
    widen(module)
    batches, wanted, ask = _answers(module, data, check, result)
    merge_and_unload(module)
    if batches:
        result.merged = difference(scores(ask, batches), wanted)
        check_close(result.merged, "merged in float32")
    for key, place in tensor_places(module).items():
        if key in dtypes:
            tensor = getattr(*place)
            tensor.data = tensor.data.to(dtypes[key])
    content = {key: value for key, value in checkpoint.items() if key not in _LEFT_OUT}
    content["state_dict"] = dict(module.state_dict())
    if batches:
        widen(module)
        result.saved = difference(scores(ask, batches), wanted)
        result.rows = sum(map(rows_of, batches))
    _write(result.out, content, force)
    name = type(module).__qualname__
    result.how = "the whole module, under its own names"
    result.use = f"{name}.load_from_checkpoint({str(result.out)!r})"


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _write(place: Path, content: dict[str, Any], force: bool) -> None:
    check_new_file(place, force)
    draft = place.with_name(f".{place.name}-{secrets.token_hex(8)}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, place)
    except (OSError, RuntimeError) as error:  # torch makes the latter of the former
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"{str(place)!r} cannot be written: {reason}. Nothing was left there. (out)"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    sync_directory(place.parent)


def _answers(
    module: Any, data: Any, check: int, result: MergeResult
) -> tuple[list[Any], list[Tensor], Any]:
    """Batches, the module's answers to them, and how it is asked; none with a note why."""
    if check < 1 or data is None:
        why = "--check 0" if check < 1 else "the run's config names no data (data)"
        result.notes.append(f"not compared with the unmerged module: {why}")
        return [], [], None
    reason: Exception | str = "it answers with no numbers"
    try:
        batches = validation_batches(module, data, check)
        module.eval()
    except Exception as error:  # of anybody's module and data
        batches, reason = [], error
    for ask in _ways(module) if batches else ():
        try:
            answers = scores(ask, batches)
        except Exception as error:  # it takes its batches otherwise
            reason = error
            continue
        if answers:
            return batches, answers, ask
    short = str(reason).splitlines()[0] if str(reason) else repr(reason)
    result.notes.append(f"not compared with the unmerged module: {short}")
    return [], [], None


def _ways(module: Any) -> Iterable[Any]:
    """How a module may be asked: as for predictions, or by the inputs of a batch."""
    yield lambda batch: module.predict_step(batch, 0)
    yield module
    yield lambda batch: module(batch[0])
