"""Files that are either there as a whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

Content = bytes | memoryview


def write_atomically(files: Mapping[Path, Content]) -> None:
    """Write `files` under temporary names, flush them to disk, then give them their names.

    A kill in the middle leaves one file as it was or as it shall be. Several that change together
    are taken away before the first new one gets its name, so that old and new never lie side by
    side; a kill in that moment leaves the old ones under temporary names.

    Raises:
        OSError: If they cannot be written; what was there before, of all of them, is still there.

    """
    paths = list(files)
    if len(files) > 1:
        files = {path: content for path, content in files.items() if not _holds(path, content)}
    several = len(files) > 1
    drafts = {path: _beside(path, "tmp") for path in files}
    kept = {path: _beside(path, "old") for path in files}
    replaced = []
    try:
        for path, content in files.items():
            with _created(drafts[path]) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if several:
            for path in files:
                _keep(path, kept[path])
            for path in files:
                if path.is_file():
                    path.unlink()
        for path, draft in drafts.items():
            os.replace(draft, path)
            replaced.append(path)
    except BaseException:
        for path in files if several else []:
            if kept[path].exists():
                os.replace(kept[path], path)
            elif path in replaced:
                path.unlink()
        raise
    finally:
        for temporary in (*drafts.values(), *kept.values()):
            _remove(temporary)
    for path in paths:
        for left in path.parent.glob(f"{_stem(path)}-*"):  # by writers that were killed
            _remove(left)
    for directory in {path.parent for path in files}:
        sync_directory(directory)


def link_atomically(target: Path, link: Path) -> None:
    """Make `link` a symbolic link to `target`, whatever it was before; a copy where links fail.

    Raises:
        OSError: If it cannot be made; what was there before is still there.

    """
    draft = _beside(link, "tmp")
    try:
        os.symlink(os.path.relpath(target, link.parent), draft)
    except OSError:  # Windows grants links to some users only
        write_atomically({link: target.read_bytes()})
        return
    try:
        os.replace(draft, link)
    finally:
        _remove(draft)
    sync_directory(link.parent)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or folders in one step; False where that is not possible.

    Linux does it (`renameat2(2)`, RENAME_EXCHANGE) on its own file systems.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here = -100  # AT_FDCWD: relative paths start from the working directory
    done = rename(here, os.fsencode(first), here, os.fsencode(second), ctypes.c_uint(2)) == 0
    if done:
        for directory in {first.parent, second.parent}:
            sync_directory(directory)
    return bool(done)


def sync_directory(directory: Path) -> None:
    """Flush the names of the files in `directory` to disk."""
    if os.name == "posix":  # elsewhere a directory cannot be opened
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _stem(path: Path) -> str:
    # Without the file's own name: Lightning takes all that contains "hpc_ckpt_" for a checkpoint.
    return f".{hashlib.sha256(path.name.encode()).hexdigest()[:12]}"


def _beside(path: Path, ending: str) -> Path:
    # A name that nobody who may write into the folder, too, can take before us.
    return path.with_name(f"{_stem(path)}-{secrets.token_hex(8)}.{ending}")


def _created(path: Path) -> BinaryIO:
    """A new file to write; FileExistsError if anything is there, were it a link to a file."""
    no_follow = 0 if sys.platform == "win32" else os.O_NOFOLLOW
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags | no_follow, 0o666))


def _holds(path: Path, content: Content) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def _keep(path: Path, place: Path) -> None:
    """The file as it is, under a second name."""
    if not path.is_file():
        return
    try:
        os.link(path, place)
    except OSError:  # not every file system has links
        with path.open("rb") as file, _created(place) as copy:
            shutil.copyfileobj(file, copy)


def _remove(path: Path) -> None:
    with suppress(OSError):  # the folder is lost or read-only, which is what is being reported
        path.unlink(missing_ok=True)
