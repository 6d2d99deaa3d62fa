"""All that is shown goes one way, on which nothing in it is obeyed by terminal or rich."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import utilities
from rich.table import Table

import lora_lightning
from lora_lightning.training import messages

PACKAGE = Path(lora_lightning.__file__).parent
ESCAPES = "\x1b]52;c;aGk=\x07\x9b2J\rx\u202e"
SPELLED = r"\x1b]52;c;aGk=\x07\x9b2J\rx\u202e"


def table_of(text: str) -> Table:
    table = Table(title=text, title_justify="left", caption=text)
    table.add_column(text)
    table.add_row(text)
    return table


@pytest.mark.parametrize("colours", [False, True])
def test_nothing_that_is_shown_is_obeyed(
    colours: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for variable in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(variable, raising=False)
    if colours:  # as in a terminal: rich's own styles are escape sequences, which stay
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    messages.show(ESCAPES, table_of(ESCAPES))
    shown = capsys.readouterr().out
    assert not {"\x07", "\x9b", "\r", "\u202e"} & {*shown}
    assert "\x1b]" not in shown
    assert ("\x1b[" in shown) == colours
    assert SPELLED in shown
    assert shown.count(r"\x1b]52;c;aGk=") == 5


def test_nothing_that_is_shown_is_markup(capsys: Any) -> None:
    for text in ("[red]a[/red]", "[/]", "[link=http://x]a", ":smile:", "x" * 300):
        messages.show(text)
        assert capsys.readouterr().out == f"{text}\n"
    messages.show(table_of("[red]:smile:[/]"))
    assert capsys.readouterr().out.count("[red]:smile:[/]") == 4


def test_warnings_and_notes(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="rows of") as caught:
        messages.rank_zero_warn(f"rows of {ESCAPES} differ")
    assert str(caught[0].message) == f"rows of {SPELLED} differ"
    assert caught[0].filename == __file__
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.INFO):
        messages.rank_zero_info(f"train: 100% of {ESCAPES}")
    assert caplog.messages == [f"train: 100% of {SPELLED}"]
    monkeypatch.setattr(utilities.rank_zero_only, "rank", 1)
    messages.rank_zero_warn("not here")


def speakers(tree: ast.AST) -> set[str]:
    """What a file has of the ways to a terminal."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "lora_lightning.training.messages":
            found |= {a.name for a in node.names} & {"rank_zero_info", "rank_zero_warn", "Console"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & {"print"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {f"{node.value.id}.{node.attr}"} & {
                "sys.stderr",
                "sys.stdout",
                "warnings.warn",
            }
    return found


# What these show is `printable` without it.
ALONE = {
    "errors.py": {"warnings.warn"},
    "engine/status.py": {"Console"},  # a text, which asks `printable` itself
    "cli/terminal.py": {"sys.stderr", "sys.stdout"},  # without torch; likewise itself
    "cli/log_filter.py": {"sys.stderr"},
    "training/messages.py": {"Console", "print"},
    "verbs/preview/result.py": {"Console"},  # a type: what `show` is given asks for the colours
    "verbs/preview/tokens.py": {"Console"},
    # Whether it is a terminal, and where Lightning's messages go; metrics ask `printable` itself.
    "training/terminal_progress.py": {"sys.stdout", "sys.stderr"},
}


def test_there_is_no_other_way() -> None:
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    found = {name: speakers(ast.parse(path.read_text())) for name, path in files.items()}
    assert {name: ways for name, ways in found.items() if ways} == ALONE


def test_the_search_for_other_ways_can_fail() -> None:
    code = "from lightning.pytorch.utilities import rank_zero_warn\nprint(1)\nwarnings.warn('')"
    assert speakers(ast.parse(code)) == {"rank_zero_warn", "print", "warnings.warn"}


def test_lines_break_between_words_on_a_terminal(capsys: Any, monkeypatch: Any) -> None:
    path, command = "runs/" + "x" * 60, "  lora-lightning " + "fit " * 20
    monkeypatch.setenv("COLUMNS", "40")
    for forced in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", forced)
        monkeypatch.setenv("TERM", "xterm-256color")
        messages.show(f"best checkpoint: {path} (4 MB)\nto go on:\n{command}")
        shown = capsys.readouterr().out.splitlines()
        first = (
            ["best checkpoint:", path, "(4 MB)"] if forced else [f"best checkpoint: {path} (4 MB)"]
        )
        assert [line.rstrip() for line in shown] == [*first, "to go on:", command.rstrip()]
