"""The checkpoints of a run directory: the newest, and the best."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder, read_checkpoint_folder
from lora_lightning.errors import CheckpointError
from lora_lightning.training.checkpoint_io import files


def checkpoints_in(folders: Iterable[Path]) -> list[Path]:
    """All checkpoints that lie in these folders, the newest last."""
    paths = {path for folder in folders for path in folder.glob("*.ckpt")}
    return sorted(filter(Path.exists, paths), key=lambda path: path.stat().st_mtime)


def last_of(found: list[Path]) -> Path:
    """The one that a run goes on from."""
    named = [path for path in found if path.name.startswith(("last", "hpc_ckpt_"))]
    return (named or found)[-1]


def best_of(found: list[Path]) -> Path:
    """The best checkpoint as the newest one remembers it.

    Raises:
        CheckpointError: If it does not say which one was; all are named.

    """
    best = monitored_best(found)
    if best is None:
        raise CheckpointError(
            f"ckpt_path='best': {str(found[-1])!r} does not say which checkpoint was the best. "
            f"Name one: {', '.join(str(path) for path in found)}. (ckpt_path)"
        )
    return best


def monitored_best(found: list[Path]) -> Path | None:
    """The best checkpoint as the newest one remembers it; None where it does not say."""
    newest = found[-1]
    with files.damage_explained(newest):
        if is_checkpoint_folder(newest):
            content = read_checkpoint_folder(newest, weights_only=True)
        else:
            content = torch.load(newest, weights_only=True, map_location="cpu")
    files.check_content(newest, content)
    for key, state in content.get("callbacks", {}).items():
        # Saved as an absolute path; only its name is used, so a run directory may be moved.
        name = Path(state.get("best_model_path") or "/").name
        best = [path for path in found if path.name == name]
        if key.startswith("ModelCheckpoint") and best:
            return best[-1]
    return None
