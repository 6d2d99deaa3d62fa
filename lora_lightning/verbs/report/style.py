"""How pictures look: one set of colours that the page can exchange for its dark ones."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.8, 2.9  # inches; at 400 pixels of a telephone text is still 10 pixels high
# name -> (on white, on the dark page). The series are those of Okabe and Ito 2008, which people
# with any kind of colour vision tell apart, lighter on dark; the ramp goes by lightness alone.
INK, MUTED, GRID = "#1f2429", "#5d6770", "#d8dde2"
SERIES = ["#0072b2", "#d55e01", "#019e73", "#cc79a7", "#b58900", "#56b4e8", "#7a5195", "#4d5258"]
RAMP = [
    *("#eef4fa", "#d6e6f3", "#b9d5ea", "#94c0de", "#6aa6cf"),
    *("#448bbd", "#276fa6", "#13538a", "#08386a"),
]
_DARK_SERIES = [
    "#5db1e6", "#ff9a52", "#3fcf9f", "#e9a3c9", "#e3be4d", "#9ad4f6", "#b996d6", "#c3c8cd",
]  # fmt: skip
_DARK_RAMP = [
    *("#18222d", "#1b3145", "#1e425f", "#225579", "#296a96"),
    *("#3a83b3", "#5a9fcb", "#86bfe2", "#bfe0f5"),
]
_DARK = {
    INK: "#e8eaed",
    MUTED: "#a2abb4",
    GRID: "#363d45",
    **dict(zip(SERIES, _DARK_SERIES, strict=True)),
    **dict(zip(RAMP, _DARK_RAMP, strict=True)),
}
_OPTIONS: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"], "font.size": 9.5, "axes.labelsize": 9.5,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.edgecolor": GRID, "axes.linewidth": 0.8, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.7,
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False,
    "figure.facecolor": "white", "axes.facecolor": "none", "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round", "text.parse_math": False, "axes.formatter.use_mathtext": False,
    "svg.fonttype": "none", "savefig.dpi": 160, "axes.unicode_minus": True,
}  # fmt: skip


def check_matplotlib() -> None:
    """Refuse to begin where there is no matplotlib.

    Raises:
        ConfigError: With the line that installs it.

    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "report draws with matplotlib, which is not installed. Install it: "
            'pip install "lora_lightning[report]"'
        )


@contextmanager
def drawing(name: str = "") -> Iterator[None]:
    """Draw or save in this style, whatever the user's own; `name` makes ids in an SVG steady."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_OPTIONS | {"svg.hashsalt": name})
        yield


def canvas(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A new figure, which no global list of matplotlib keeps, with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def as_png(figure: Figure) -> bytes:
    """The picture as a PNG on white."""
    content = io.BytesIO()
    with drawing():
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def as_svg(figure: Figure, name: str, label: str) -> str:
    """The picture as an SVG element of a page: without ids that others have, in its colours."""
    content = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with drawing(name):
        figure.savefig(content, format="svg", metadata=nothing, facecolor="none")
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", text, flags=re.S)
    box = re.search(r'viewBox="[^"]*"', text)
    inside = text[text.index(">") + 1 :]
    inside = re.sub(r'\bid="', f'id="{name}-', inside)
    inside = re.sub(r'(url\(|href=")#', rf"\1#{name}-", inside)
    for number, colour in enumerate(_DARK):
        inside = inside.replace(colour, f"var(--c{number})")
    inside = re.sub(r"\n\s*", "\n", inside)
    head = f'<svg role="img" aria-label="{escape(label)}" {box[0] if box else ""}'
    return f'{head} xmlns:xlink="http://www.w3.org/1999/xlink">{inside}'.strip()


def colour_rules() -> tuple[str, str]:
    """The colours of the pictures as CSS variables: on white, on dark."""
    light = "".join(f"--c{number}:{colour};" for number, colour in enumerate(_DARK))
    dark = "".join(f"--c{number}:{colour};" for number, colour in enumerate(_DARK.values()))
    return light, dark
