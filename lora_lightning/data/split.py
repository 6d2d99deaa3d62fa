"""A train/validation split that cannot leak: it is decided by each text itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from lora_lightning.data.records import Record


def normalised(text: str) -> str:
    """`text` casefolded, with every run of white space made one blank."""
    return " ".join(text.casefold().split())


def split_records(
    records: Iterable[Record], validation_fraction: float
) -> tuple[list[Record], list[Record]]:
    """Training and validation records, about `validation_fraction` of the texts in the latter.

    A hash of the normalised text decides, so equal texts never fall on both sides, and a text
    stays on its side when the file grows, is reordered, or is read on another machine.
    """
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        digest = hashlib.sha256(normalised(record.text).encode()).digest()
        uniform = int.from_bytes(digest[:8], "big") / 2**64
        sides[uniform < validation_fraction].append(record)
    return sides
