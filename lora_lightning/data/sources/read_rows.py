"""Rows of text data from wherever they are, one after the other, each with its place."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.data.sources import hf_datasets
from lora_lightning.data.sources.files import READERS, Columns
from lora_lightning.data.sources.row import Row as Row
from lora_lightning.data.sources.row import Skip, check_ordinary
from lora_lightning.errors import RecordError, first_few, nearest_file

# Names of splits, also as words in the names of files.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "eval": "test",
}

KNOWN = ".jsonl, .json, .csv, .txt (also with .gz), .parquet"


def read_rows(
    source: str, *, key: str, skip: int = 0, columns: Columns | None = None, streaming: bool = False
) -> Iterator[Row]:
    """The rows of `source` in order, read as they are asked for.

    Args:
        source: A `.jsonl` file (one object per line), `.json` (an array of objects, or one object
            per line), `.csv` (with a header), `.parquet` or `.txt` (one text per line); all but
            Parquet also as `.gz`. A pattern of such files (`data/*.jsonl`) or a folder of one
            kind of them, read in order of their names. A folder that
            `datasets.Dataset.save_to_disk` wrote. Or a dataset of the Hugging Face hub, as
            `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`.
        key: The config key that holds `source`, for error messages.
        skip: Rows at the start that are passed over, and not parsed where that can be avoided.
        columns: Columns that every row must have, each with the config key that names it. What
            else a dataset or Parquet file holds is then not read.
        streaming: Read a dataset of the hub over the network as rows are asked for, instead of
            downloading it first. Files are always read so.

    Raises:
        RecordError: If there is no such source (at once), or one of its rows cannot be read (when
            it is reached).
    """
    columns = columns or {}
    source = os.fspath(source)  # a Path, too
    check_no_text(source, key)
    path = Path(source).expanduser()
    if path.is_dir() and hf_datasets.is_saved_dataset(path):
        dataset = hf_datasets.saved_dataset(path, key)
        return hf_datasets.dataset_rows(dataset, str(path), Skip(skip), columns)
    if not path.exists() and _kind(path) not in READERS and hf_datasets.is_hub_name(source):
        dataset = hf_datasets.hub_dataset(source, key, streaming, hint=nearest_file(path))
        return hf_datasets.dataset_rows(dataset, source, Skip(skip), columns)
    files = _files(path, key)
    for file in files:
        check_ordinary(file, key)
    return _file_rows(files, Skip(skip), columns)


def check_no_text(source: str, key: str) -> None:
    """Refuse a text in the place of a file: a prompt, or a row."""
    path = Path(source)
    try:
        path = path.expanduser()
        is_path = path.exists() or (path.parent != Path() and path.parent.is_dir())
        near = nearest_file(path)
    except (OSError, ValueError, RuntimeError):  # too long for a name; a null byte; no such user
        is_path, near, named = False, "", False
    else:
        named = _kind(path) in READERS and "\n" not in source
        named = named or (hf_datasets.is_hub_name(source) and ": " not in source)
        named = named or not re.search(r"\s", source)
    if is_path or named:
        return
    ways = "Write its rows into a file (.jsonl, .csv, .txt, ...), and name that"
    if key == "data.predict":
        ways += (
            "; or have one prompt of a language model answered at once: lora-lightning generate "
            "RUN --prompt '...'"
        )
    shown = source if len(source) <= 60 else f"{source[:60]}..."
    raise RecordError(
        f"{shown!r} is no file, folder or dataset, but reads like a text; {key} names where rows "
        f"are read from.{near} {ways}. ({key})"
    )


def _file_rows(files: list[Path], skip: Skip, columns: Columns) -> Iterator[Row]:
    for file in files:
        yield from READERS[_kind(file)](file, skip, columns)


def _files(path: Path, key: str) -> list[Path]:
    """The files that `path` stands for."""
    if path.is_dir():
        return _files_of_folder(path, key)
    if path.exists():
        check_ordinary(path, key)  # before its name is looked at: /dev/fd/63 has no suffix
        if _kind(path) not in READERS:
            raise RecordError(
                f"{path}: unknown file type {path.suffix!r}. Known: {KNOWN}, a folder of such "
                f"files, or a folder saved by datasets.Dataset.save_to_disk. ({key})"
            )
        return [path]
    if glob.has_magic(str(path)):
        return _files_of_pattern(path, key)
    missing = f"{path}: no such file"
    if not path.parent.is_dir():
        raise RecordError(f"{missing}; the folder {path.parent} does not exist either. ({key})")
    raise RecordError(f"{missing}.{nearest_file(path)} ({key})")


def _files_of_folder(folder: Path, key: str) -> list[Path]:
    # Hidden files, such as macOS's `._x.csv`, are none. A link that leads nowhere is one, and an
    # error when it is read.
    files = sorted(
        file
        for file in folder.iterdir()
        if _kind(file) in READERS and not file.name.startswith(".") and not file.is_dir()
    )
    kinds = sorted({_kind(file) for file in files})
    if not files:
        raise RecordError(
            f"{folder}: is a folder, but holds no data files ({KNOWN}) and was not saved by "
            f"datasets.Dataset.save_to_disk (no state.json). ({key})"
        )
    if len(kinds) > 1:
        raise RecordError(
            f"{folder}: holds files of several kinds ({', '.join(kinds)}). Name one kind by a "
            f"pattern, such as '{folder / f'*{kinds[0]}'}'. ({key})"
        )
    words = {word for file in files for word in re.split(r"[^a-z]+", file.name.lower())}
    splits = {SPLITS[word] for word in words & SPLITS.keys()}
    if len(splits) > 1:
        raise RecordError(
            f"{folder}: holds files of several splits ({first_few(file.name for file in files)}). "
            f"Name the files of one, such as '{files[-1]}' or a pattern. ({key})"
        )
    return files


def _files_of_pattern(pattern: Path, key: str) -> list[Path]:
    matches = sorted(Path(match) for match in glob.glob(str(pattern), recursive=True))
    files = [match for match in matches if not match.is_dir()]
    unknown = [str(file) for file in files if _kind(file) not in READERS]
    if not files:
        raise RecordError(f"{pattern}: no file matches this pattern. ({key})")
    if unknown:
        raise RecordError(
            f"{pattern}: matches files of an unknown type: {first_few(unknown)}. Known: {KNOWN}. "
            f"({key})"
        )
    return files


def _kind(path: Path) -> str:
    """The suffix that says how a file is read; gzip is no kind of its own."""
    suffixes = path.suffixes
    compressed = suffixes[-1:] == [".gz"] and suffixes[-2:-1] not in ([], [".parquet"])
    return (suffixes[-2:-1] if compressed else suffixes[-1:] or [""])[0].lower()
