"""What `report` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Report:
    """A page about runs; a notebook shows it.

    Attributes:
        html: The page.
        figures: matplotlib's figures by name.
        findings: What the page says in its headings.
        path: Of the page.
        figures_path: Of the folder of PNGs.

    """

    html: str
    figures: Mapping[str, Figure]
    findings: list[str]
    path: Path
    figures_path: Path

    def __str__(self) -> str:
        return "\n".join(self.findings)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        page = escape(self.html, quote=True)
        size = "width:100%;height:760px;border:1px solid #8884;border-radius:8px"
        return f'<iframe title="report" sandbox srcdoc="{page}" style="{size}"></iframe>'
