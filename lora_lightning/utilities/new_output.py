"""Folders and files that a command makes: there as a whole or not at all, never over others."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_lightning.errors import ConfigError
from lora_lightning.utilities.atomic_write import sync_directory


@contextmanager
def new_folder(out: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """A folder to fill, which gets the name `out` when the block ends well, and else is gone.

    Args:
        out: Its name to be. Folders above it are made.
        force: Put it in the place of a folder that is there.

    Raises:
        ConfigError: If something is there already, or it cannot be written.

    """
    place = Path(out)
    check_new_folder(place, force)
    draft = _beside(place)
    old = _beside(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
        for file in draft.rglob("*"):
            if file.is_file() and not file.is_symlink():
                _flush(file)
        if os.path.lexists(place):
            os.replace(place, old)
        try:
            os.replace(draft, place)
        except BaseException:
            if old.exists():
                os.replace(old, place)
            raise
        sync_directory(place.parent)
    except OSError as error:
        if error.filename is not None and not Path(str(error.filename)).is_relative_to(draft):
            raise
        raise ConfigError(
            f"{str(place)!r} cannot be written: {error.strerror or error}. Nothing was left there. "
            "(out)"
        ) from error
    finally:
        for rest in (draft, old):
            if rest.is_dir() and not rest.is_symlink():
                shutil.rmtree(rest, ignore_errors=True)
            else:
                rest.unlink(missing_ok=True)


def check_new_folder(out: str | os.PathLike[str], force: bool = False) -> None:
    """Refuse a name that `new_folder` would refuse; before work that takes long.

    Raises:
        ConfigError: If something is there already, and not to be replaced.

    """
    _check_free(Path(out), force)


def check_new_file(out: str | os.PathLike[str], force: bool = False) -> Path:
    """The path of a file that may be written.

    Raises:
        ConfigError: If something is there already, and not to be replaced.

    """
    place = Path(out)
    _check_free(place, force)
    if place.is_dir():
        raise ConfigError(f"{str(place)!r} is a folder; name a file. (out)")
    return place


def _check_free(place: Path, force: bool) -> None:
    if not place.name or place.name == "..":
        raise ConfigError(f"{str(place)!r} is no name for something new. (out)")
    if os.path.lexists(place) and not force:
        raise ConfigError(
            f"{str(place)!r} is there already; nothing is overwritten. Name another place, or "
            "replace it with --force. (out)"
        )


def _beside(place: Path) -> Path:
    # A name that nobody who may write into the folder, too, can take before us.
    return place.with_name(f".{place.name}-{secrets.token_hex(8)}.tmp")


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
