"""Token ids as text in which it can be seen what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lora_lightning.errors import printable

# Where there are no colours. Not [ and ], which texts are full of.
OPEN, CLOSE = "⟦", "⟧"
LEARNED = "black on green"


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of which all are learned, or none.

    Attributes:
        text: As the tokenizer decodes them behind what is before them.
        learned: Whether they are learned.
        tokens: How many there are.
        label: What is written behind it, such as the label of a word.
        left_out: Not to be shown.
    """

    text: str
    learned: bool
    tokens: int
    label: str = ""
    left_out: bool = False


def pieces_of(
    tokenizer: Any, ids: Sequence[int], learned: Sequence[bool], most: int
) -> list[Piece]:
    """Cut a text where what is learned begins and ends; the texts together are its decoding.

    Args:
        tokenizer: A Hugging Face tokenizer.
        ids: Token ids.
        learned: Of each.
        most: Of a longer text so many tokens are shown, half of them from its end.
    """
    first, last = most - most // 2, len(ids) - most // 2
    hidden = [len(ids) > most and first <= place < last for place in range(len(ids))]
    pieces: list[Piece] = []
    end, before = 0, ""
    for (left_out, is_learned), run in groupby(zip(hidden, learned, strict=True)):
        count = sum(1 for _ in run)
        end += count
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if end < len(ids):  # half a character goes with its other half
            text = max(text.rstrip("\ufffd"), before, key=len)
        pieces.append(Piece(text[len(before) :], is_learned, count, left_out=left_out))
        before = text
    return pieces


@dataclass(frozen=True)
class TokenText:
    """One row of a batch.

    Attributes:
        title: Where it is from, and what is said of it.
        documents: Its parts, which do not see each other; each in pieces.
        names: Of the parts, where they have any.
    """

    title: str
    documents: tuple[tuple[Piece, ...], ...]
    names: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The texts, in colours where there are some."""
        colours = _has_colours(console)
        yield Text(printable(self.title), style="bold")
        for number, document in enumerate(self.documents):
            if len(self.documents) > 1:
                name = self.names[number] if self.names else f"document {number + 1}"
                tokens = sum(piece.tokens for piece in document)
                yield Text(f"-- {printable(name)}, {tokens:,} tokens", style="dim")
            yield _in_colours(document) if colours else _in_brackets(document)
        yield Text("")


def legend(console: Console) -> Text:
    """How what is learned is marked."""
    text = Text("what is learned is marked ")
    if _has_colours(console):
        return text.append("so", LEARNED).append("\n")
    return text.append(f"{OPEN}so{CLOSE}\n")


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _in_colours(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for piece in pieces:
        text.append(_said(piece), LEARNED if piece.learned else "dim" if piece.left_out else "")
        text.append(printable(piece.label), "bold cyan")
    return text


def _in_brackets(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for piece in pieces:
        said = _said(piece)
        for bracket in (OPEN, CLOSE):  # those of the text are none of ours
            said = said.replace(bracket, f"\\u{ord(bracket):x}")
        text.append(f"{OPEN}{said}{CLOSE}" if piece.learned else said)
        text.append(printable(piece.label))
    return text


def _said(piece: Piece) -> str:
    if piece.left_out:
        return f"[... {piece.tokens:,} tokens are not shown ...]"
    return printable(piece.text)
