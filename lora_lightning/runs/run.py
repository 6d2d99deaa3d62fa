"""A run by one name: its directory, a checkpoint of it, or its config file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.checkpoint.peft.config import CONFIG as PEFT_CONFIG
from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder
from lora_lightning.errors import CheckpointError, ConfigError, first_few, nearest_file
from lora_lightning.runs.checkpoints import best_of, checkpoints_in, last_of, monitored_best
from lora_lightning.training.checkpoint_io.files import check_checkpoint_file
from lora_lightning.utilities.shipped_configs import config_path, shipped_configs

# In the run directory: what the newest `lora-lightning fit` there was started with, all resolved.
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        checkpoint: The checkpoint that was asked for.
        directory: The run directory; None for a checkpoint that lies somewhere else.
        config: The resolved config of its newest fit; empty where the command did not start it.
        monitored: Whether `checkpoint` is what some metric called the best.

    """

    checkpoint: Path
    directory: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    monitored: bool = False


def find_run(place: str | os.PathLike[str], ckpt: str | None = None) -> Run:
    """Find a run by its directory, one of its checkpoints, or a config that names its directory.

    Args:
        place: The directory (`trainer.default_root_dir`), a checkpoint, or a config: its file, or
            its name if it comes with the package.
        ckpt: Of a directory, the checkpoint: `best`, `last` or a path. Default: the best, where
            something was monitored, else the last.

    Raises:
        CheckpointError: If there is no such run, or it has no checkpoint.
        ConfigError: If a config names no run directory.

    """
    path = Path(place)
    named = not path.exists() and str(place) in shipped_configs()
    if named or (path.suffix in (".yaml", ".yml") and path.is_file()):
        path = directory_of_config(path)
    is_checkpoint = path.is_file() or is_checkpoint_folder(path)
    if not is_checkpoint and not path.is_dir():
        raise CheckpointError(
            f"There is no run {str(place)!r}: name its directory (trainer.default_root_dir), a "
            f"checkpoint of it, or its config.{nearest_file(path)} (run)"
        )
    if is_checkpoint:
        if ckpt is not None:
            raise ConfigError(
                f"{str(place)!r} is a checkpoint already; ckpt={ckpt!r} has no run directory to be "
                "looked up in. Give one of them. (ckpt)"
            )
        directory = next((p for p in path.absolute().parents[:2] if config_file(p)), None)
        return Run(path, directory, config_of(directory) if directory else {})
    if (path / PEFT_CONFIG).is_file():
        raise CheckpointError(
            f"{str(place)!r} is an adapter's PEFT folder, no run: name the run directory that "
            "holds its checkpoints and config. (run)"
        )
    checkpoint, monitored = _chosen(path, ckpt)
    return Run(checkpoint, path, config_of(path), monitored)


def config_file(directory: Path) -> Path | None:
    """The config that the newest fit in a run directory was started with; None if none is there."""
    if (directory / CONFIG).is_file():
        return directory / CONFIG
    # Of runs from before there was that file: those of any call.
    logged = directory.glob("logs/version_*/config.yaml")
    return max(logged, key=lambda path: path.stat().st_mtime, default=None)


def config_of(directory: Path) -> dict[str, Any]:
    """The content of `config_file`; empty where there is none."""
    config = config_file(directory)
    return _read(config) if config else {}


def directory_of_config(*configs: Path) -> Path:
    """The run directory that config files name, the last one that does having the say.

    A config that comes with the package may be given by its name.

    Raises:
        ConfigError: If none does, or there is no such config.

    """
    for config in reversed(configs):
        trainer = _read(config_path(str(config))).get("trainer")
        named = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
        if named:
            return Path(named)
    raise ConfigError(
        f"{first_few(map(str, configs))} names no run directory (trainer.default_root_dir): name "
        "the directory itself. (run)"
    )


def _chosen(directory: Path, ckpt: str | None) -> tuple[Path, bool]:
    """The checkpoint that is asked for, and whether something calls it the best."""
    if ckpt not in (None, "best", "last"):
        check_checkpoint_file(str(ckpt))
        return Path(str(ckpt)), False
    found = checkpoints_of(directory)
    if not found:
        raise CheckpointError(
            f"The run directory {str(directory)!r} holds no checkpoint yet: nothing was trained "
            "there, or its checkpoints lie elsewhere; name one of those. (run)"
        )
    if ckpt == "last":
        return last_of(found), False
    best = best_of(found) if ckpt == "best" else monitored_best(found)
    return (last_of(found), False) if best is None else (best, True)


def checkpoints_of(directory: Path) -> list[Path]:
    """The checkpoints of a run directory, the newest last: the command's, or else a Trainer's."""
    found = checkpoints_in([directory / "checkpoints", directory, *_dirpaths(directory)])
    if found:
        return found
    # A Trainer's own place, with a version for each run.
    folders = {path.parent for path in directory.glob("*/version_*/checkpoints/*.ckpt")}
    newest = max(folders, key=lambda path: path.stat().st_mtime, default=None)
    return checkpoints_in([newest]) if newest else []


def _dirpaths(directory: Path) -> list[Path]:
    """The folders that the ModelCheckpoints of a config write to."""
    entries = (config_of(directory).get("trainer") or {}).get("callbacks") or []
    options = [entry.get("init_args") or {} for entry in entries if isinstance(entry, dict)]
    return [Path(found["dirpath"]) for found in options if found.get("dirpath")]


def _read(config: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"{str(config)!r} cannot be read as a config: {reason} (run)") from error
    return content if isinstance(content, dict) else {}
