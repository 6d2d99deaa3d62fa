"""Checkpoint files that survive crashes: written as a whole or not at all, checked when read.

Lightning's own writer is not enough: it moves a finished file from the system's temporary folder,
which is a copy in place where that is another file system, and never flushes to disk; a background
writer (`AsyncCheckpointIO`) lets the old file be deleted before the new one is written; and a
`last.ckpt` that is a link is taken away before it is made anew.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

from lora_lightning.checkpoint.integrity import (
    HASHES,
    damaged_parts,
    why_unreadable,
    with_hashes,
)
from lora_lightning.checkpoint.peft.config import CONFIG
from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder
from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.errors import CheckpointError, LoraError, did_you_mean, first_few
from lora_lightning.training import _lightning
from lora_lightning.training._lightning import trainer_of
from lora_lightning.training.collectives import all_or_none
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.strategies.state_overrides import read_checkpoint
from lora_lightning.training.summary import readable_bytes
from lora_lightning.utilities.atomic_write import link_atomically, write_atomically
from lora_lightning.utilities.is_a import is_a

_VERSION = "pytorch-lightning_version"  # in everything that a Trainer writes


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically and with hashes of their content.

    On local disks a checkpoint is written under a temporary name, flushed, given its name, and the
    folder flushed. Paths of other file systems go Lightning's way, with the hashes. `background` is
    the plugin that calls this one from a thread of its own, if any.
    """

    def __init__(self, background: Any = None) -> None:
        self.background = background
        self._failed = False
        self._newest: Path | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write it; where that fails (CheckpointError), a file of that name is as it was."""
        if KEY in checkpoint:  # absent where a run failed before adapters were attached
            checkpoint = with_hashes(checkpoint)
        file = _local(path)
        if file is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically({file: buffer.getbuffer()})
        except OSError as error:
            self._failed = True
            raise _unwritten(file, buffer.getbuffer().nbytes, error) from error
        self._failed, self._newest = False, file

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read it; CheckpointError says what is damaged, and names the newest good one."""
        with damage_explained(path):
            checkpoint = super().load_checkpoint(path, *args, **kwargs)
            check_content(path, checkpoint)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete `path`, as soon as all that was to be saved before is on disk."""
        self.in_order(lambda: self._remove(path))

    def in_order(self, action: Callable[[], None]) -> None:
        """Do `action` after the saves that are under way, and not at all where the last failed."""
        executor = _lightning.background_executor(self.background)
        if executor is None:
            self._unless_failed(action)
        else:
            executor.submit(self._unless_failed, action)

    def _unless_failed(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            if self.background is None:
                raise
            _lightning.fail_in_background(self.background, error)

    def _remove(self, path: str | Path) -> None:
        file = _local(path)
        newest = self._newest
        if file is not None and newest is not None and newest != file:
            for link in file.parent.glob("*.ckpt"):  # last.ckpt, which gets its new target later
                if link.is_symlink() and link.resolve() == file.resolve():
                    link_atomically(newest, link)
        super().remove_checkpoint(path)


def protect_checkpoints(trainer: Trainer) -> None:
    """Have this Trainer's checkpoints written and read by `DurableCheckpointIO`.

    It takes the place of Lightning's `TorchCheckpointIO`, also inside of plugins that wrap it.
    Doing it again changes nothing.
    """
    strategy, wrappers = trainer.strategy, []
    plugin: Any = strategy.checkpoint_io
    while getattr(plugin, "checkpoint_io", None) is not None:
        wrappers.append(plugin)
        plugin = plugin.checkpoint_io
    if type(plugin).__name__ == "TorchCheckpointIO":
        background = next(filter(_lightning.works_in_background, wrappers), None)
        plugin = DurableCheckpointIO(background)
        if wrappers:
            _lightning.replace_wrapped(wrappers[-1], plugin)
        else:
            strategy.checkpoint_io = plugin
    elif not isinstance(plugin, DurableCheckpointIO):
        rank_zero_warn(
            f"Checkpoints are written by {type(plugin).__name__}, in its own way: without hashes "
            "of their content, and whether a crash can leave half a file is up to it. "
            "(trainer.plugins)"
        )
    for callback in trainer.checkpoint_callbacks:
        if is_a(callback, "ModelCheckpoint"):
            _lightning.override_link(callback, _link_checkpoint)
    strategy.load_checkpoint = MethodType(_load_checkpoint, strategy)  # type: ignore[method-assign]
    strategy.save_checkpoint = MethodType(_save_checkpoint, strategy)  # type: ignore[method-assign]
    trainer.save_checkpoint = MethodType(_save_of_own, trainer)  # type: ignore[method-assign]


def _save_of_own(self: Trainer, *args: Any, **kwargs: Any) -> None:
    """Save as this Trainer's, though another one, without a LoraCallback, has the module by now."""
    module, newest = self.lightning_module, trainer_of(self.lightning_module)
    if module is None or newest is self:
        type(self).save_checkpoint(self, *args, **kwargs)
        return
    module.trainer = self
    try:
        type(self).save_checkpoint(self, *args, **kwargs)
    finally:
        module.trainer = newest


def _save_checkpoint(
    self: Strategy, checkpoint: dict[str, Any], filepath: str | Path, *args: Any, **kwargs: Any
) -> None:
    save = type(self).save_checkpoint
    all_or_none(self, lambda: save(self, checkpoint, filepath, *args, **kwargs), filepath)


def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
    """`ModelCheckpoint._link_checkpoint`, but without a moment in which there is no link."""
    if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
        plugin: Any = trainer.strategy.checkpoint_io
        while getattr(plugin, "checkpoint_io", None) is not None:
            plugin = plugin.checkpoint_io
        in_order = getattr(plugin, "in_order", lambda action: action())
        in_order(lambda: link_atomically(Path(filepath), Path(linkpath)))
    trainer.strategy.barrier()


# -- reading -----------------------------------------------------------------------------------


def check_checkpoint_file(path: str) -> None:
    """Raise CheckpointError if there is no such file, naming the nearest in its folder."""
    if os.path.isfile(path) or "://" in path or is_checkpoint_folder(path):
        return
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, CONFIG)):
            raise CheckpointError(
                f"{path!r} is a PEFT folder: an adapter, not the checkpoint of a run. Give it to "
                f"LoraCallback(init_from={path!r}) in place of ckpt_path. (lora.init_from)"
            )
        inside = [name for name in sorted(os.listdir(path)) if name.endswith(".ckpt")]
        raise CheckpointError(
            f"Checkpoint {path!r} is a folder; name a file. It holds "
            f"{first_few(inside) or 'no checkpoint'}. (ckpt_path)"
        )
    if os.path.exists(path):
        raise CheckpointError(
            f"Checkpoint {path!r} is no ordinary file but a device, a pipe or the like, which may "
            "never end. (ckpt_path)"
        )
    folder = os.path.dirname(path) or "."
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    near = did_you_mean(os.path.basename(path), files)
    if near:
        hint = f"Did you mean {os.path.join(folder, near)!r}?"
    else:
        hint = f"{folder!r} holds {', '.join(files[:8]) or 'nothing' if files else 'no files'}."
    raise CheckpointError(f"Checkpoint {path!r} does not exist. {hint} (ckpt_path)")


@contextmanager
def damage_explained(path: str | Path) -> Iterator[None]:
    """Turn what a damaged file makes the reader raise into one clear CheckpointError."""
    try:
        yield
    except LoraError:
        raise
    except Exception as error:  # damaged files raise almost anything
        file = _local(path)
        found = damage(file) if file is not None and file.is_file() else None
        if file is not None and found is None and "PytorchStreamReader" in str(error):
            found = str(error).partition(". ")[0]  # in a field that Python's reader leaves out
        if found is None and isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{str(path)!r} cannot be read as a checkpoint: {why_unreadable(error)}."
            ) from error
        if file is None or found is None:
            raise
        raise _damaged(file, found) from error


def check_content(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Raise CheckpointError if `checkpoint`, read from `path`, is not what was written."""
    file = _local(path)
    found = damage(file) if file is not None and _is_archive(file) else None
    if found is None:
        _check_kind(path, checkpoint)
    parts = damaged_parts(checkpoint) if isinstance(checkpoint, dict) else None
    if parts:
        found = f"{first_few(parts, 3)} is not what was written" + (
            f" ({found})"
            if found
            else f" (if you edited it yourself, delete its [{KEY!r}][{HASHES!r}])"
        )
    if found:
        raise _damaged(file if file is not None else Path(str(path)), found)


def _check_kind(path: str | Path, content: object) -> None:
    if isinstance(content, dict) and _VERSION in content:
        return
    hint = "Name a file that a Trainer wrote (.ckpt)."
    if isinstance(content, dict):
        holds = f"a dict with {first_few([repr(key) for key in content], 3) or 'nothing in it'}"
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            hint = (
                "It is a state dict: load it into the module before fit, "
                "module.load_state_dict(torch.load(path)), and train without ckpt_path."
            )
    else:
        holds = f"a {type(content).__name__}"
    raise CheckpointError(
        f"{str(path)!r} is no checkpoint of a Trainer: it holds {holds}. {hint} (ckpt_path)"
    )


def damage(file: Path) -> str | None:
    """The damage of a file as an archive of PyTorch; None where each checksum is right."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except zipfile.BadZipFile as error:
        if not file.stat().st_size:
            return "it is empty"
        return str(error) if _is_archive(file) else "it is no PyTorch archive"
    except Exception as error:  # likewise
        return str(error) or type(error).__name__
    return f"the checksum of its part {bad!r} is wrong" if bad else None


def _is_archive(file: Path) -> bool:
    if not file.is_file():  # the folder of a sharded one
        return False
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\3\4"


def newest_good(folder: Path, but: Path | None = None) -> Path | None:
    """The newest checkpoint in `folder` that can be read and is what was written."""
    with suppress(OSError):
        files = [f for f in folder.glob("*.ckpt") if f.is_file() and f != but]
        for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
            with suppress(Exception):
                content = torch.load(file, map_location="cpu", weights_only=True)
                if KEY in content and not damaged_parts(content) and damage(file) is None:
                    return file
    return None


def _load_checkpoint(
    self: Strategy, checkpoint_path: str | Path, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    checkpoint_path = self.broadcast(checkpoint_path)
    check_checkpoint_file(str(checkpoint_path))
    with damage_explained(checkpoint_path):
        checkpoint = read_checkpoint(self, checkpoint_path, *args, **kwargs)
        if os.path.isdir(checkpoint_path):  # files are checked where they are read
            check_content(checkpoint_path, checkpoint)
        return checkpoint


def _local(path: str | Path) -> Path | None:
    """`path` where it is one of a local disk."""
    files = get_filesystem(path)
    if not isinstance(files, LocalFileSystem):
        return None
    plain = "://" not in str(path)  # stays relative, for messages
    return Path(path).expanduser() if plain else Path(files._strip_protocol(str(path)))


def _damaged(file: Path, found: str) -> CheckpointError:
    good = newest_good(file.parent, file)
    size = file.stat().st_size if file.is_file() else 0
    hint = f"The newest good one beside it is {str(good)!r}" if good else "No good one is beside it"
    return CheckpointError(
        f"Checkpoint {str(file)!r} ({size:,} bytes) is truncated or damaged: {found}. Nothing was "
        f"loaded. {hint}. (ckpt_path)"
    )


def _unwritten(file: Path, size: int, error: OSError) -> CheckpointError:
    free = ""
    with suppress(OSError):
        free = f", {readable_bytes(shutil.disk_usage(file.parent).free)} are free there"
    good = newest_good(file.parent)
    kept = f"The newest good one there is {str(good)!r}" if good else "No other one is there"
    return CheckpointError(
        f"Checkpoint {str(file)!r} could not be written: {error.strerror or error} (it takes "
        f"{readable_bytes(size)}{free}). Nothing was overwritten or deleted. {kept}. Make room or "
        "name another folder, and resume from there."
    )
