"""The rows of one JSON Lines, JSON, CSV, Parquet or text file, read as they are needed."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lora_lightning.data.sources.row import (
    LONGEST_LINE,
    Row,
    Skip,
    check_depth,
    require_columns,
    with_label_names,
)
from lora_lightning.errors import RecordError, first_few

# Rows of a Parquet file that are in memory at a time as Python objects.
PARQUET_BATCH = 1024
_SPACE = re.compile(r"[ \t\r\n]*")

# Columns that every row must have, each with the config key that names it.
Columns = Mapping[str, str]


def jsonl_rows(path: Path, skip: Skip, columns: Columns) -> Iterator[Row]:
    """One JSON object per line; blank lines are no rows."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip() or skip.take():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            column = min(error.pos, len(line.rstrip())) + 1
            raise RecordError(
                f"{where}, column {column}: broken JSON: {error.msg}. "
                "Each line must be one complete JSON object."
                + (" (Or the file one array of them.)" if ".json" in path.suffixes else "")
            ) from error
        except (RecursionError, ValueError) as error:
            raise _beyond_limits(error, where) from error
        yield _json_row(values, where, columns)


def json_rows(path: Path, skip: Skip, columns: Columns) -> Iterator[Row]:
    """A JSON array of objects, or one object per line."""
    first = next((line for line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from jsonl_rows(path, skip, columns)
        return
    text = "".join(_lines(path))
    line, counted = 1, 0
    for start, values in _array_elements(text, path):
        line, counted = line + text.count("\n", counted, start), start
        if not skip.take():
            yield _json_row(values, f"{path}, line {line}", columns)


def csv_rows(path: Path, skip: Skip, columns: Columns) -> Iterator[Row]:
    """Comma-separated fields below a header; every value is a string."""
    csv.field_size_limit(LONGEST_LINE)  # Python's 131,072 are too few for documents
    # strict: an unclosed quote is an error, not a field that swallows the rest of the file
    reader = csv.reader(_lines(path), strict=True)
    start = 1  # a quoted field may span lines: name the line where the row begins
    header: list[str] | None = None
    try:
        for fields in reader:
            where, start = f"{path}, line {start}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
                if twice := [name for name in header if header.count(name) > 1]:
                    raise RecordError(f"{where}: the header names the column {twice[0]!r} twice.")
                require_columns(header, columns, where)
                continue
            if skip.take():
                continue
            if len(fields) != len(header):
                raise RecordError(
                    f"{where}: found {len(fields)} fields, but the header has {len(header)} "
                    f"({first_few(header)}). A field that holds commas, quotes or line breaks "
                    "must be quoted."
                )
            yield Row(dict(zip(header, fields, strict=True)), where)
    except csv.Error as error:
        raise RecordError(f"{path}, line {start}: broken CSV: {error}.") from error


def text_rows(path: Path, skip: Skip, columns: Columns) -> Iterator[Row]:
    """One text per line, in a column `text`; blank lines are no rows."""
    require_columns(["text"], columns, str(path))
    for number, line in enumerate(_lines(path), start=1):
        if line.strip() and not skip.take():
            yield Row({"text": line.rstrip("\r\n")}, f"{path}, line {number}")


def parquet_rows(path: Path, skip: Skip, columns: Columns) -> Iterator[Row]:
    """The rows of a Parquet file, one row group after the other; passed-over groups stay unread."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise RecordError(
            f"{path}: reading Parquet needs the package 'pyarrow'. "
            'Install it with: pip install "lora_lightning[data]"'
        ) from error
    try:
        with ParquetFile(path) as file:
            require_columns(file.schema_arrow.names, columns, str(path))
            named = with_label_names(_features(file.schema_arrow, path))
            first = skip.take(file.metadata.num_rows)
            number = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= first:
                    number += rows
                    continue
                for batch in file.iter_batches(
                    PARQUET_BATCH, row_groups=[group], columns=list(columns) or None
                ):
                    start = min(max(first - number, 0), len(batch))
                    number += start
                    for values in batch.slice(start).to_pylist():
                        yield Row(named(values), f"{path}, row {number}")
                        number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(f"{path}: broken Parquet file: {str(error).splitlines()[0]}") from error


READERS = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    ".txt": text_rows,
}


def _json_row(values: object, where: str, columns: Columns) -> Row:
    if not isinstance(values, dict):
        raise RecordError(
            f"{where}: expected a JSON object, found {type(values).__name__}. "
            'Each row must be one object such as {"text": "...", "label": "..."}.'
        )
    check_depth(values, where)
    require_columns(values, columns, where)
    return Row(values, where)


def _beyond_limits(error: Exception, where: str) -> RecordError:
    """What Python's JSON cannot take, though it may be well-formed."""
    if isinstance(error, RecursionError):
        return RecordError(
            f"{where}: lists or objects lie within each other too deep to be read. Remove the row "
            "or write it flatter."
        )
    return RecordError(
        f"{where}: holds a number of too many digits ({str(error).partition(';')[0]}). Remove it "
        "or write it as a string."
    )


def _array_elements(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Each element of a JSON array, as it is parsed, and the position where it starts."""
    decoder = json.JSONDecoder()

    def after_space(position: int) -> int:
        return cast(re.Match[str], _SPACE.match(text, position)).end()

    position = after_space(text.index("[") + 1)
    try:
        while not text.startswith("]", position):
            values, end = decoder.raw_decode(text, position)
            yield position, values
            position = after_space(end)
            if text.startswith(",", position):
                position = after_space(position + 1)
            elif not text.startswith("]", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if (rest := after_space(position + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}. "
            "The file must be one complete JSON array of objects."
        ) from error
    except (RecursionError, ValueError) as error:
        line = text.count("\n", 0, position) + 1
        raise _beyond_limits(error, f"{path}, line {line}") from error


def _features(schema: Any, path: Path) -> dict[str, Any]:
    """Features of the columns that Hugging Face `datasets` wrote into a Parquet file."""
    noted = (schema.metadata or {}).get(b"huggingface")
    try:
        info = json.loads(noted).get("info", {}) if noted else {}
        check_depth(info, str(path))
        return info.get("features") or {}
    except (ValueError, RecursionError, AttributeError) as error:  # no JSON, or no objects
        raise RecordError(
            f"{path}: what its metadata say of its columns (b'huggingface') cannot be read. Write "
            "the file again."
        ) from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, decoded one by one so that an error knows its line."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise RecordError(
                        f"{path}, line {number}: is longer than {LONGEST_LINE:,} bytes. Break it "
                        "up: of JSON, one object a line (.jsonl)."
                    )
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}, line {number}, byte {error.start + 1}: not UTF-8 ({error.reason}). "
            "Save the file as UTF-8."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f"{path}, after line {number}: broken gzip: {error}.") from error
    except OSError as error:
        raise RecordError(
            f"{path}: cannot be read: {error.strerror or error}. Make sure that the file is there "
            "and that you may read it."
        ) from error
