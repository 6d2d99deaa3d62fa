"""The verb `merge`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lora_lightning.checkpoint.single_file import read_adapter_checkpoint
from lora_lightning.checkpoint.state_dict import KEY, TASK
from lora_lightning.engine.switching import set_adapter
from lora_lightning.errors import ConfigError, nearest_hint
from lora_lightning.runs.build import data_of, trained_module
from lora_lightning.runs.run import find_run
from lora_lightning.training.messages import console_of_terminal, show
from lora_lightning.utilities.new_output import check_new_file
from lora_lightning.verbs.merge.result import MergeResult
from lora_lightning.verbs.merge.whole_model import Wanted, merge_model
from lora_lightning.verbs.merge.whole_module import merge_module

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


def merge(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    dequantize: bool = False,
    ckpt: str | None = None,
    adapter: str | list[str] | None = None,
    check: int = 8,
    max_shard_size: str = "5GB",
    force: bool = False,
    module: Any = None,
    data: Any = None,
) -> MergeResult:
    """Make the adapters of a run part of its model, and write that.

    Of a task of this library it becomes a Hugging Face folder, which plain transformers loads; of
    a LightningModule of one's own a checkpoint, which the module's `load_from_checkpoint` loads.
    Neither needs this library any more.

    Args:
        run: The run directory, a checkpoint of it, or its config.
        out: The folder, or of a LightningModule of one's own the file, that is written.
        dtype: Of the weights. They are computed in float32, or wider. Default: each tensor keeps
            the dtype that it has in the base's files.
        dequantize: Write a plain model where the base was rounded to few bits.
        ckpt: Which checkpoint of a run directory: best, last or a path. Default: the best, where
            something was monitored, else the last.
        adapter: The adapters that are merged, by name. Default: all of the checkpoint.
        check: On how many validation rows the merged model is compared with the unmerged one; 0:
            on none.
        max_shard_size: The most that a file of weights holds, and that is in memory at a time.
        force: Replace what is there.
        module: The class of the LightningModule, where the run's config does not say it.
        data: A data module to compare on, where the run's config does not say it.

    Returns:
        What was written, and how it compares.

    Raises:
        CheckpointError: If there is no such run, or its checkpoint is damaged.
        ConfigError: If an option does not go with the run, the output exists, or cannot be written.
        AdapterMismatchError: If the base is not the one that the adapters were trained on.
        AdapterStateError: If the merged model would not compute the same.

    """
    found = find_run(run, ckpt)
    checkpoint = read_adapter_checkpoint(found.checkpoint)
    names = _chosen([*checkpoint[KEY]["adapters"]], adapter)
    wanted = Wanted(
        found, checkpoint, names, _dtype(dtype), dequantize, module, data, check, max_shard_size
    )
    result = MergeResult(Path(out), found.checkpoint, names)
    with _bars_on_terminals():
        (merge_model if TASK in checkpoint else _merge_module)(wanted, result, force)
    show(*result.lines())
    return result


def _merge_module(wanted: Wanted, result: MergeResult, force: bool) -> None:
    if wanted.dequantize:
        raise ConfigError(
            "dequantize is for the tasks of this library, which round their base themselves; "
            f"{str(result.checkpoint)!r} is of another module. Leave it out. (dequantize)"
        )
    check_new_file(result.out, force)
    module = trained_module(wanted.run, wanted.module)
    set_adapter(module, wanted.adapters)
    rows = data_of(wanted.run, wanted.data) if wanted.check else None
    merge_module(module, wanted.checkpoint, result, rows, wanted.check, wanted.dtype, force)


def _dtype(dtype: object) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in get_args(Dtype):
        hint = nearest_hint(name, get_args(Dtype))
        raise ConfigError(
            f"dtype={name!r} is not known.{hint} Known are {', '.join(get_args(Dtype))}. (dtype)"
        )
    found: torch.dtype = getattr(torch, name)
    return found


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Leave out transformers' progress bars where they would fill a log file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not console_of_terminal().is_terminal:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _chosen(known: list[str], adapter: str | list[str] | None) -> list[str]:
    names = known if adapter is None else [adapter] if isinstance(adapter, str) else [*adapter]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"The checkpoint has no adapter {name!r}.{nearest_hint(name, known)} It has: "
                f"{', '.join(known)}. (adapter)"
            )
    if not names:
        raise ConfigError("No adapter is named that could be merged. (adapter)")
    return names
