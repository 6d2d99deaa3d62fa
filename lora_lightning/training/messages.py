"""What the user is told: the one way by which text of ours, and of others, reaches a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from lightning.pytorch import utilities
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lora_lightning.errors import printable


def rank_zero_info(message: str) -> None:
    """Lightning's, with what is not `printable` spelled out."""
    utilities.rank_zero_info(printable(message))


def rank_zero_warn(message: str) -> None:
    """Lightning's, with what is not `printable` spelled out."""
    utilities.rank_zero_warn(printable(message), stacklevel=5)  # of the caller, as without us


def show(*items: RenderableType) -> None:
    """Print tables and lines as they are: nothing in them is markup, what is not `printable` is
    spelled out.
    """
    # By way of print(), which a live progress bar knows to keep above itself; a rich console of
    # our own would write over it.
    print(rendered(*items), end="", flush=True)


def rendered(*items: RenderableType) -> str:
    """What `show` prints."""
    console = console_of_terminal()
    with console.capture() as captured:
        for item in items:
            if isinstance(item, str) and console.is_terminal:
                item = _broken_between_words(item, console.width)
            console.print(_Printable(item))
    return captured.get()


def _broken_between_words(text: str, width: int) -> str:
    """As a terminal would not break it; commands, which are indented, stay whole."""
    lines = []
    for line in text.split("\n"):
        fits = len(line) <= width or line.startswith("  ")
        options = {"break_long_words": False, "break_on_hyphens": False, "tabsize": 1}
        lines += [line] if fits else textwrap.wrap(line, width, **options)  # type: ignore[arg-type]
    return "\n".join(lines)


def console_of_terminal() -> Console:
    """As wide and colourful as the terminal; in text there is neither markup nor emoji codes."""
    return Console(soft_wrap=True, markup=False, emoji=False, highlight=False)


@dataclass
class _Printable:
    item: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        # Here, behind all that rich makes of an item, styles are not yet escape sequences.
        item = printable(self.item) if isinstance(self.item, str) else self.item
        for segment in console.render(item, options):
            yield Segment(printable(segment.text), segment.style)
