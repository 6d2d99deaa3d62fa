"""What a preview shows: for a terminal, a file, a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table

from lora_lightning.errors import printable
from lora_lightning.training import messages
from lora_lightning.verbs.preview.tokens import TokenText, legend

_BAR = 40  # characters of the longest one
_CLASSES = 40  # rows of a table


@dataclass(frozen=True, repr=False)
class Preview:
    """The data as the model will see them; printed, it is a text, in a notebook a page.

    Attributes:
        texts: Rows with tokens, each in pieces that are learned or not.
        parts: All that is shown, in order.
        told: What became of each split: how much there is, what is learned, cut and left out.
    """

    texts: tuple[TokenText, ...] = ()
    parts: tuple[RenderableType, ...] = ()
    told: dict[str, str] = field(default_factory=dict)

    def show(self) -> None:
        """Print it."""
        messages.show(self)

    def __str__(self) -> str:
        return messages.as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return messages.as_html(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """All of it, one below the other."""
        if any(piece.learned for text in self.texts for part in text.documents for piece in part):
            yield legend(console)
        yield from self.texts
        yield from self.parts
        yield from map(printable, self.told.values())


def histogram(title: str, numbers: Sequence[int]) -> list[RenderableType]:
    """A bar for each of about ten ranges, and a line of what lies in the middle and at the ends."""
    width = 1
    while max(numbers) > 10 * width:
        width *= 2
    counts = [0] * (max(numbers) // width + 1)
    for number in numbers:
        counts[number // width] += 1
    first = next(place for place, count in enumerate(counts) if count)
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for place, count in list(enumerate(counts))[first:]:
        low, high = place * width, min((place + 1) * width - 1, max(numbers))
        bar = "█" * max(round(_BAR * count / max(counts)), 1) if count else ""
        table.add_row(f"{low:,}" if low == high else f"{low:,}-{high:,}", bar, f"{count:,}")
    ordered = sorted(numbers)
    places = (share * (len(ordered) - 1) // 100 for share in (0, 50, 95, 100))
    least, middle, most, greatest = (f"{ordered[place]:,}" for place in places)
    said = f"shortest {least}, median {middle}, 95 % up to {most}, longest {greatest}\n"
    return [table, said]


def table(title: str, header: Iterable[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of what may come from files, without lines that are too many."""
    made = Table(title=printable(title), title_justify="left")
    names = list(header)
    for name in names:
        made.add_column(name, overflow="fold")
    for row in rows[:_CLASSES]:
        made.add_row(*map(printable, row))
    if len(rows) > _CLASSES:
        made.add_row(f"... ({len(rows):,} in all)", *[""] * (len(names) - 1))
    return made
