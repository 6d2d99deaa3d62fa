"""Sentences whose words have labels, from rows, and which sub-token stands for which word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lightning.data.sources.read_rows import read_rows
from lora_lightning.data.sources.row import check_characters, described
from lora_lightning.errors import RecordError, first_few

# How public data sets call the labels of words.
LABEL_COLUMNS = ("labels", "ner_tags", "tags")


@dataclass(frozen=True)
class Sentence:
    """Words, a label for each (none where none were asked for), and where they were found."""

    words: tuple[str, ...]
    labels: tuple[str, ...]
    where: str

    @property
    def text(self) -> str:
        """The words as running text."""
        return " ".join(self.words)


def read_sentences(
    path: str, *, key: str, tokens_column: str, label_column: str | None
) -> list[Sentence]:
    """All sentences of a file or dataset, in order.

    Args:
        path, key: As for `read_rows`.
        tokens_column: The column of the words, a list of strings.
        label_column: That of as many labels; None reads words only.

    Raises:
        RecordError: If the file or any of its rows cannot be used.
    """
    columns = {tokens_column: "data.tokens_column"}
    if label_column is not None:
        columns[label_column] = "data.label_column"
    sentences = []
    for row in read_rows(path, key=key, columns=columns):
        words = _words(row.values[tokens_column], f"{row.where}, column {tokens_column!r}")
        labels: tuple[str, ...] = ()
        if label_column is not None:
            where = f"{row.where}, column {label_column!r}"
            labels = _labels(row.values[label_column], where, words)
        sentences.append(Sentence(words, labels, row.where))
    if not sentences:
        raise RecordError(f"{path}: no rows; the file is empty. ({key})")
    return sentences


def find_label_column(path: str, key: str) -> str:
    """The column of `path` that is called as columns of word labels are."""
    first = next(iter(read_rows(path, key=key)), None)
    if first is None:
        raise RecordError(f"{path}: no rows; the file is empty. ({key})")
    found = list(first.values)
    known = [column for column in LABEL_COLUMNS if column in found]
    if len(known) != 1:
        problem = f"has several ({', '.join(known)})" if known else "has none of them"
        raise RecordError(
            f"{path}: the labels of words are expected in a column {first_few(LABEL_COLUMNS)}; it "
            f"{problem}. Columns found: {first_few(found, 20)}. Name the one to use. "
            "(data.label_column)"
        )
    return known[0]


def first_subtokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The first sub-token of each word in the tokenised text of `words` joined by blanks.

    Tokenised so, words are the tokens that they are in running text, whatever a tokenizer makes of
    blanks ("Ġgood", "▁good", "good"); given one by one, byte-level ones would miss the blank.

    Args:
        words: The words.
        offsets: Of each sub-token, where it begins and ends in the text, in characters.

    Returns:
        Places in `offsets`; None for a word with no sub-token of its own: cut off, made of
        characters that the tokenizer drops, or within a sub-token of the word before.
    """
    places: list[int | None] = []
    token, start = 0, 0
    for word in words:
        end = start + len(word)
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        begins = token < len(offsets) and offsets[token][0] < end and offsets[token][1] > start
        places.append(token if begins else None)
        token += begins  # what this sub-token also covers of the next word is not counted twice
        start = end + 1
    return places


def _words(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise RecordError(
            f"{where}: the words must be a list of strings, found {described(value)}."
        )
    for number, word in enumerate(value, start=1):
        if not isinstance(word, str):
            raise RecordError(f"{where}: word {number} must be a string, found {described(word)}.")
        check_characters(word, f"{where}, word {number}")
    if not any(map(str.strip, value)):
        raise RecordError(f"{where}: there are no words. Remove the row or fill it in.")
    return tuple(value)


def _labels(value: object, where: str, words: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise RecordError(
            f"{where}: the labels must be a list, one for each word, found {described(value)}."
        )
    if len(value) != len(words):
        raise RecordError(
            f"{where}: {len(value)} labels for {len(words)} words; each word has one."
        )
    for number, label in enumerate(value, start=1):
        if label is None or label == "":
            raise RecordError(f"{where}: the label of word {number} is missing.")
        if not isinstance(label, (str, int)) or isinstance(label, bool):
            raise RecordError(
                f"{where}: the label of word {number} must be a string or an integer, found "
                f"{described(label)}."
            )
    return tuple(map(str, value))
