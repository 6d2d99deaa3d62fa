"""What is refused before a run starts: strategies and plugins that cannot work, broken files."""

from __future__ import annotations

import os
import pickle
import zipfile
from types import MethodType
from typing import Any

from lora_lightning.errors import CheckpointError, ConfigError, did_you_mean, first_few

_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}
_BASE_CHANGERS = {"BaseFinetuning", "ModelPruning"}


def check_strategy(trainer: Any) -> None:
    """Only strategies under which adapters are known to train, save and resume.

    Raises:
        ConfigError: For every other one.

    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    known = {cls.__name__ for cls in type(strategy).__mro__} & _STRATEGIES
    if not known or name.startswith("DeepSpeed"):
        raise ConfigError(
            f"LoraCallback does not support {name} in this version: adapters would not be sharded, "
            "saved or restored correctly. Use a single device or strategy='ddp'. (trainer.strategy)"
        )


def check_callbacks(trainer: Any) -> None:
    """No callback that trains or changes base weights, which adapter checkpoints do not hold.

    Raises:
        ConfigError: For those that do.

    """
    for callback in trainer.callbacks:
        name = next(
            (c.__name__ for c in type(callback).__mro__ if c.__name__ in _BASE_CHANGERS), None
        )
        if name is not None:
            raise ConfigError(
                f"{type(callback).__name__} changes base weights, but with LoraCallback the base "
                "is frozen and checkpoints hold adapters only: its work would be lost. Take one of "
                "the two out. (trainer.callbacks)"
            )


def check_checkpoint_file(path: str) -> None:
    """There is such a file.

    Raises:
        CheckpointError: Naming the nearest file in its folder.

    """
    if os.path.isfile(path) or "://" in path:
        return
    if os.path.isdir(path):
        inside = [name for name in sorted(os.listdir(path)) if name.endswith(".ckpt")]
        raise CheckpointError(
            f"Checkpoint {path!r} is a folder; name a file. It holds "
            f"{first_few(inside) or 'no checkpoint'}. (ckpt_path)"
        )
    folder = os.path.dirname(path) or "."
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    near = did_you_mean(os.path.basename(path), files)
    if near:
        hint = f"Did you mean {os.path.join(folder, near)!r}?"
    else:
        hint = f"{folder!r} holds {', '.join(files[:8]) or 'nothing' if files else 'no files'}."
    raise CheckpointError(f"Checkpoint {path!r} does not exist. {hint} (ckpt_path)")


def unreadable(path: str, error: Exception) -> CheckpointError | None:
    """What to say of a file that torch could not read; None where the file is not at fault."""
    text = str(error)
    if not os.path.isfile(path):
        return None
    if zipfile.is_zipfile(path) and ("weights_only" in text or "Unsupported global" in text):
        return None  # whole, but holds objects that torch refuses: torch says which
    size = os.path.getsize(path)
    if "Weights only" in text:  # torch's advice on pickles does not help with a broken file
        text = "it is no PyTorch archive"
    return CheckpointError(
        f"Checkpoint {path!r} ({size:,} bytes) is truncated or damaged and cannot be read: "
        f"{(text or type(error).__name__).splitlines()[0][:120]}. Resume from another one"
        f"{_others(path)}. (ckpt_path)"
    )


READ_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError)


def explain_unreadable_checkpoints(strategy: Any) -> None:
    """Override `load_checkpoint` on this strategy so that a broken file gets a clear error.

    Doing it again changes nothing.
    """
    if getattr(strategy.__dict__.get("load_checkpoint"), "__func__", None) is not _load_checkpoint:
        strategy.load_checkpoint = MethodType(_load_checkpoint, strategy)


def _load_checkpoint(self: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
    check_checkpoint_file(str(checkpoint_path))
    try:
        return type(self).load_checkpoint(self, checkpoint_path, *args, **kwargs)
    except READ_ERRORS as error:
        explained = unreadable(str(checkpoint_path), error)
        if explained is None:
            raise
        raise explained from error


def _others(path: str) -> str:
    folder = os.path.dirname(path) or "."
    others = [
        f for f in sorted(os.listdir(folder)) if f.endswith(".ckpt") and f != os.path.basename(path)
    ]
    return f" ({', '.join(others)} lie beside it)" if others else ""
