"""Sharded checkpoints on disk: whole or not there, with the hashes that single files carry.

`ModelParallelStrategy` and `FSDPStrategy` write into the folder of the final name, over what was
there. Here they write beside it, and the folder gets its name when every process is done. Every
process writes to the same (shared) disk, as the strategies demand.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy

from lora_lightning.checkpoint.integrity import HASHES, content_hashes
from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder
from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.training._lightning import writes_folders
from lora_lightning.training.collectives import all_or_none
from lora_lightning.utilities.atomic_write import exchange
from lora_lightning.utilities.dtensor import full_state


def save_sharded_checkpoint(
    strategy: Strategy,
    module: LightningModule,
    checkpoint: dict[str, Any],
    filepath: str | Path,
    storage_options: object = None,
) -> None:
    """Write a checkpoint in the strategy's form: a folder, or a file by rank 0.

    CheckpointError where another process, whose own error says why, could not.
    """
    path = Path(strategy.broadcast(filepath))
    old, partial = (path.with_name(f".{path.name}.{word}") for word in ("old", "partial"))
    save = type(strategy).save_checkpoint

    def on_first(action: Callable[[], None]) -> None:
        all_or_none(strategy, lambda: action() if strategy.is_global_zero else None, path)

    if not writes_folders(strategy):
        on_first(lambda: _aside(path, old))  # the strategy's own removal is a race of all processes
        try:
            all_or_none(strategy, lambda: save(strategy, checkpoint, path, storage_options), path)
        except Exception:
            if strategy.is_global_zero and old.exists() and not path.exists():
                old.rename(path)
            raise
        on_first(lambda: _remove(old))
        return
    gathered = {key: full_state(checkpoint.get(key)) for key in ("state_dict", "optimizer_states")}
    if KEY in checkpoint and strategy.is_global_zero:
        full = {**checkpoint, **{k: v for k, v in gathered.items() if k in checkpoint}}
        metadata = {**checkpoint[KEY], HASHES: content_hashes(full)}
        checkpoint = {**checkpoint, KEY: metadata}
    on_first(lambda: _remove(partial))  # of a run that was killed
    all_or_none(strategy, lambda: save(strategy, dict(checkpoint), partial, storage_options), path)
    on_first(lambda: _replace(partial, path, old))


def _replace(partial: Path, path: Path, old: Path) -> None:
    """Give the finished folder its name, in place of what has it."""
    _flush(partial)
    if path.exists() and exchange(partial, path):
        _remove(partial)  # it has the one before now
        return
    if path.is_file():
        path.unlink()
    _aside(path, old)
    partial.rename(path)
    _remove(old)


def _aside(path: Path, old: Path) -> None:
    """Give a folder that is to be replaced another name; a file is simply replaced."""
    _remove(old)
    if is_checkpoint_folder(path):
        path.rename(old)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():  # ModelCheckpoint(save_last="link"), for one
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
