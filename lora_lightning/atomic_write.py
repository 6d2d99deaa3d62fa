"""Files that are either there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_atomically(files: dict[Path, bytes]) -> None:
    """Write `files` under temporary names, flush them to disk, then give them their names.

    Raises:
        OSError: If they cannot be written; what was there before, of all of them, is still there.

    """
    drafts = {path: _beside(path, "tmp") for path in files}
    kept = {path: _beside(path, "old") for path in files}
    replaced = []
    try:
        for path, content in files.items():
            with open(drafts[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if len(files) > 1:
            for path in files:
                _keep(path, kept[path])
        for path, draft in drafts.items():
            os.replace(draft, path)
            replaced.append(path)
    except BaseException:
        for path in replaced if len(files) > 1 else []:
            if kept[path].exists():
                os.replace(kept[path], path)
            else:
                path.unlink()
        raise
    finally:
        for temporary in (*drafts.values(), *kept.values()):
            temporary.unlink(missing_ok=True)
    for directory in {path.parent for path in files}:
        _sync_directory(directory)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")


def _keep(path: Path, place: Path) -> None:
    """The file as it is, under a second name."""
    if not path.is_file():
        return
    try:
        os.link(path, place)
    except OSError:  # not every file system has links
        shutil.copyfile(path, place)


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
