"""Source of samples, as settings that a worker process can be given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from lora_lightning.data.samples.formats import announce_format, read_samples, recognised_format
from lora_lightning.data.samples.sample import Sample
from lora_lightning.data.sources.read_rows import read_rows
from lora_lightning.data.sources.row import Row
from lora_lightning.errors import RecordError


@dataclass(frozen=True)
class TextSource:
    """Path of rows, and their format.

    Attributes:
        path: As `read_rows` takes it.
        key: The config key of `path`.
        format: As for `read_samples`, like those below.
        columns: What the format's columns are called.
        chat: Make conversations of Alpaca rows.
        prompts_only: Leave answers unread.
        streaming: Read a dataset of the hub as rows are asked for.
    """

    path: str
    key: str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    chat: bool = False
    prompts_only: bool = False
    streaming: bool = False

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """The rows, without the first `skip`."""
        return read_rows(self.path, key=self.key, skip=skip, streaming=self.streaming)

    def samples(self, rows: Iterable[Row] | None = None) -> Iterator[Sample]:
        """Read the samples of all rows, or of some."""
        return read_samples(
            self.rows() if rows is None else rows,
            format=self.format,
            columns=self.columns,
            chat=self.chat,
            prompts_only=self.prompts_only,
        )

    def recognised(self) -> TextSource:
        """Return the source with the first row's format, and say which that is."""
        for row in self.rows():
            if self.format is not None:
                return self
            form = recognised_format(row, self.columns or {}, self.prompts_only)
            announce_format(row, form, self.columns or {})
            return replace(self, format=form)
        raise RecordError(f"{self.path}: no rows; it is empty. ({self.key})")
