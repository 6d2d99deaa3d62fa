"""What the user is told: the one way by which text of ours, and of others, reaches a terminal."""

from __future__ import annotations

import io
import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import utilities
from lightning_utilities.core import rank_zero
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lora_lightning.errors import printable


def rank_zero_info(message: str) -> None:
    """Lightning's, with what is not `printable` spelled out."""
    utilities.rank_zero_info(printable(message))


@contextmanager
def notes_kept() -> Iterator[list[str]]:
    """What is said by `rank_zero_info` in this block, instead of into the log."""
    logger: logging.Logger = rank_zero.log  # of the newest package that has set it
    notes: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno == logging.INFO:
            notes.append(record.getMessage())
        return record.levelno != logging.INFO

    logger.addFilter(keep)
    try:
        yield notes
    finally:
        logger.removeFilter(keep)


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


def write(text: str) -> None:
    """Print a piece of a text as it comes: what is not `printable` is spelled out."""
    print(printable(text), end="", flush=True)


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


def console_of_terminal(**options: Any) -> Console:
    """As wide and colourful as the terminal; in text there is neither markup nor emoji codes."""
    # In a notebook rich would show an empty output of its own beside the printed text.
    options |= {"markup": False, "emoji": False, "highlight": False, "force_jupyter": False}
    return Console(soft_wrap=True, **options)


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Leave out transformers' progress bars where they would fill a log file."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    if not console_of_terminal().is_terminal:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def as_text(*items: RenderableType) -> str:
    """What `show` prints where there are no colours, such as in a log file."""
    console = console_of_terminal(file=io.StringIO(), width=100, color_system=None)
    with console.capture() as captured:
        for item in items:
            console.print(_Printable(item))
    return captured.get()


def as_html(*items: RenderableType) -> str:
    """What `show` prints on a terminal, for a notebook: text, so that nothing in it is HTML."""
    console = console_of_terminal(
        file=io.StringIO(),
        width=100,
        color_system="truecolor",
        force_terminal=True,
        record=True,
        no_color=False,
    )
    for item in items:
        console.print(_Printable(item))
    page = '<pre style="white-space: pre-wrap; line-height: normal">{code}</pre>'
    return console.export_html(inline_styles=True, code_format=page)


@dataclass
class _Printable:
    item: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        # Here, behind all that rich makes of an item, styles are not yet escape sequences.
        item = printable(self.item) if isinstance(self.item, str) else self.item
        for segment in console.render(item, options):
            yield Segment(printable(segment.text), segment.style)
