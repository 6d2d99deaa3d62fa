"""Texts in pieces as token ids: no token lies in two pieces, and a prompt's ids are its own.

A model that is asked to go on after a prompt reads the ids of that prompt alone. Tokenised together
with what follows they can be others: GPT-2 writes "\\n\\n" as one token at the end of a text and as
two before a word, and a blank at the end joins the word after it. A model trained on those would be
asked to go on from ids that it never saw. So pieces are tokenised together only where that leaves
the ids of what is before each cut as they are, and else apart.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


@dataclass
class _Section:
    """A part of a text that no token can cross, cut where the text is cut into pieces."""

    parts: list[str] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)  # the piece that each part is of

    def heads(self) -> list[str]:
        """The first part, the first two, ..., all."""
        return list(accumulate(self.parts))


class PieceTokenizer:
    """Token ids of texts in pieces, without the tokens that a tokenizer adds to a text.

    Args:
        tokenizer: Any Hugging Face tokenizer; offsets are not needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = _AddedTokens(tokenizer)
        # Llama 2's manner: every text is given a blank at its start.
        self._adds_a_blank = tokenizer.decode(2 * self._ids(["a"])["a"]) != "aa"

    def __call__(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """The ids of each piece of each text; equal parts of them are tokenised once."""
        cut = [self._sections(pieces) for pieces in texts]
        sections = [section for text in cut for section in text]
        ids = self._ids(head for section in sections for head in section.heads())
        torn = [
            part
            for section in sections
            for part, before, head in _steps(section, ids)
            if not _adds(before, head)
        ]
        later = self._continuations(torn)
        result: list[list[Ids]] = [[[] for _ in pieces] for pieces in texts]
        for found, text in zip(result, cut, strict=True):
            for section in text:
                for piece, step in zip(section.pieces, _steps(section, ids), strict=True):
                    part, before, head = step
                    found[piece] += head[len(before) :] if _adds(before, head) else later[part]
        return result

    def _sections(self, pieces: Sequence[str]) -> list[_Section]:
        text, ends = "".join(pieces), list(accumulate(map(len, pieces)))
        starts = {0, *self._added.starts(text)}
        sections = []
        for start, end in pairwise(sorted({*starts, *ends})):
            if start in starts:
                sections.append(_Section())
            sections[-1].parts.append(text[start:end])
            sections[-1].pieces.append(bisect_right(ends, start))
        return sections

    def _ids(self, texts: Iterable[str]) -> dict[str, Ids]:
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        encoded = self._tokenizer(
            unique,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # of the model's maximum, which max_length minds
        )
        return dict(zip(unique, encoded["input_ids"], strict=True))

    def _continuations(self, parts: list[str]) -> dict[str, Ids]:
        """The ids of texts that follow another, so without a blank that the file has not."""
        plain = self._ids(parts)
        if not self._adds_a_blank:
            return plain
        result = dict(plain)
        for before in ("a", "\n"):  # what one of them merges with, the other does not
            joint = self._ids([before, *(before + part for part in plain)])
            mark = joint[before]
            for part in plain:
                if joint[before + part][: len(mark)] == mark:
                    result[part] = joint[before + part][len(mark) :]
        return result


class _AddedTokens:
    """Finder of added tokens (`<|im_end|>`), which tokenizers cut out of a text before all else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokens = {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if not (token.normalized or token.lstrip or token.single_word)
        }
        # There are thousands like <unused17>: one pattern finds all numbers.
        forms = {re.sub(r"\d+", r"\\d+", re.escape(token)) for token in self._tokens}
        self._pattern = re.compile("|".join(sorted(forms, key=len, reverse=True)) or "(?!)")

    def starts(self, text: str) -> Iterator[int]:
        """Find where they begin; no other token crosses these places."""
        matches = self._pattern.finditer(text)
        return (match.start() for match in matches if match.group() in self._tokens)


def _steps(section: _Section, ids: dict[str, Ids]) -> Iterator[tuple[str, Ids, Ids]]:
    """Each part, with the ids of what is before it and of what is up to its end."""
    heads = [[], *(ids[head] for head in section.heads())]
    for part, (before, head) in zip(section.parts, pairwise(heads), strict=True):
        yield part, before, head


def _adds(before: Ids, head: Ids) -> bool:
    """True if the part between leaves the ids before it as they are."""
    return head[: len(before)] == before
