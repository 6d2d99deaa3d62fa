"""Train/validation split that cannot leak: a hash of each record's content decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TypeVar

from lora_lightning.data.samples.sample import Document, PromptCompletion, Sample

T = TypeVar("T")


def normalised(text: str) -> str:
    """`text` casefolded, with every run of white space made one blank."""
    return " ".join(text.casefold().split())


def is_held_out(content: str, fraction: float) -> bool:
    """True if a record is among the about `fraction` of all that are held out for validation.

    A hash of the normalised `content` decides, so equal contents never fall on both sides, and a
    record stays on its side when the file grows, is reordered, or is read on another machine, or
    row by row.
    """
    digest = hashlib.sha256(normalised(content).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def split_records(
    records: Iterable[T], fraction: float, content: Callable[[T], str] = attrgetter("text")
) -> tuple[list[T], list[T]]:
    """Training and validation records, about `fraction` of the contents in the latter.

    `content` is what a record says, by which `is_held_out` decides; by default its `text`.
    """
    sides: tuple[list[T], list[T]] = ([], [])
    for record in records:
        sides[is_held_out(content(record), fraction)].append(record)
    return sides


def sample_content(sample: Sample) -> str:
    """All that is read and learned in a sample, but not where it stands."""
    if isinstance(sample, Document):
        return sample.text
    if isinstance(sample, PromptCompletion):
        return f"{sample.prompt}\0{sample.completion}"
    return json.dumps([sample.messages, sample.tools], sort_keys=True, default=str)
