"""A page in headless Chromium: how wide it is, and a picture of it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium makes no window as narrow as a telephone, but a frame.
_FRAME = """<!DOCTYPE html><body style="margin:0"><iframe id="page" srcdoc="{page}"
style="width:{width}px;height:{height}px;border:0"></iframe><pre id="found"></pre><script>
document.getElementById("page").onload = (event) => {{
  const doc = event.target.contentDocument, root = doc.documentElement;
  const wide = [...doc.querySelectorAll("body *:not(svg *)")].filter(
    (e) => e.getBoundingClientRect().right > {width} + 0.5);
  const texts = [...doc.querySelectorAll("figure svg text")];
  const small = texts.map((e) => e.getBoundingClientRect().height);
  document.getElementById("found").textContent = JSON.stringify({{
    scroll: root.scrollWidth, wide: wide.length, height: root.scrollHeight,
    figures: doc.querySelectorAll("figure svg").length, smallest: Math.min(...small),
    ink: getComputedStyle(doc.body).color, paper: getComputedStyle(doc.body).backgroundColor}});
}};
</script></body>"""


def browser() -> str:
    """The browser's name; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    return found


def opened(page: str, width: int, folder: Path, dark: bool = False) -> dict[str, float | str]:
    """Open a page in a frame of this width; what its layout came to. Leaves `<width>.png`."""
    if dark:  # as a reader's system would ask for it
        page = page.replace("(prefers-color-scheme:dark)", "(min-width:1px)")
    file = folder / "frame.html"
    options = {"page": html.escape(page, quote=True), "width": width, "height": 3000}
    file.write_text(_FRAME.format(**options), encoding="utf-8")
    dom = _run(folder, "--virtual-time-budget=20000", "--dump-dom", file.as_uri())
    _run(
        folder, "--hide-scrollbars", f"--window-size={max(width, 500)},3000",
        f"--screenshot={folder / f'{width}.png'}", file.as_uri(),
    )  # fmt: skip
    found = re.search(r'<pre id="found">(\{.*?\})</pre>', dom, re.S)
    assert found, dom[-2000:]
    content: dict[str, float | str] = json.loads(html.unescape(found[1]))
    return content


def _run(folder: Path, *options: str) -> str:
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
