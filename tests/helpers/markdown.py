"""The pages of the repository (all *.md), and what stands in them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.paths import ROOT

_FOLDERS = ("", "configs", "lora_lightning", "notebooks", "tests")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in _FOLDERS
    for path in sorted((ROOT / folder).glob("**/*.md" if folder else "*.md"))
}


def blocks(language: str, page: str | None = None) -> list[tuple[str, str]]:
    """(page, code) of every block of a language, on one page or on all."""
    return [
        (name, code)
        for name, text in PAGES.items()
        if page in (None, name)
        for code in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    level, text = heading.split()[0], PAGES[page]
    assert text.count(f"\n{heading}\n") == 1, f"{page}: {heading}"
    below = text.partition(f"\n{heading}\n")[2]
    return re.split(rf"^#{{1,{len(level)}}} ", below, flags=re.MULTILINE)[0]


def recipe(heading: str) -> str:
    """The worked example below a heading of CONTRIBUTING.md."""
    (code,) = re.findall(r"```python\n(.*?)```", section("CONTRIBUTING.md", heading), re.DOTALL)
    return str(code)


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table on a page whose first cell is `head`, without its header."""
    (table,) = re.findall(
        rf"^\| {re.escape(head)} \|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def linked(page: str) -> list[tuple[Path, str]]:
    """(file or folder, anchor) of every relative link on a page."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "http://")):
            path, _, anchor = target.partition("#")
            found.append(((ROOT / page).parent / path if path else ROOT / page, anchor))
    return found


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
