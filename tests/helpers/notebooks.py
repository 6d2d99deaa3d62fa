"""The notebooks executed, by their tests, and to commit them with what they show:

python -m tests.helpers.notebooks 01_quickstart.ipynb
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from tests.helpers.paths import ROOT

FOLDER = ROOT / "notebooks"
E2E = Path(os.environ.get("E2E_FILE") or ROOT.parent / "shared" / "data" / "e2e" / "valid.txt")


@contextmanager
def jupyter(home: Path) -> Iterator[None]:
    """Jupyter as if freshly installed, whose one kernel is this interpreter."""
    spec = home / "data" / "kernels" / "python3"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "Python 3", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    own = {"IPYTHONDIR": str(home / "ipython")}
    for name in ("DATA", "CONFIG", "RUNTIME"):
        (home / name.lower()).mkdir(exist_ok=True)
        own[f"JUPYTER_{name}_DIR"] = str(home / name.lower())
    with mock.patch.dict(os.environ, own):
        for name in ("JUPYTER_PATH", "MPLBACKEND"):
            os.environ.pop(name, None)
        yield


def execute(notebook: Any, folder: Path, expressions: Sequence[str] = ()) -> dict[str, Any]:
    """Run all cells in `folder`; return the values of `expressions` afterwards, by expression."""
    values = ", ".join(f"{text!r}: {text}" for text in expressions)
    probed = nbformat.from_dict({**notebook, "cells": [*notebook.cells]})
    probed.cells.append(new_code_cell(f"print({{{values}}})"))
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        probed,
        timeout=900,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        coalesce_streams=True,  # a progress bar, as it ends
    )
    client.execute()
    notebook.cells = probed.cells[:-1]
    return dict(ast.literal_eval(probed.cells[-1].outputs[0].text))


def images(notebook: Any) -> list[str]:
    """Its pictures, in base64."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def _presentable(notebook: Any, folder: Path) -> None:
    """Leave out what is logged beside the output, and where on this machine it ran."""
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",)}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.outputs:
            for texts in (output, output.get("data", {})):
                for key in ("text", "text/plain", "text/html"):
                    if key in texts:
                        plain = texts[key].replace(str(folder), ".")
                        texts[key] = re.sub(rf"{tempfile.gettempdir()}/[\w-]+", "tmp", plain)


def main() -> None:
    """Execute the notebooks that are named, and write their outputs into them."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("E2E_FILE", str(E2E))
    for name in sys.argv[1:]:
        notebook = nbformat.read(FOLDER / name, as_version=4)
        with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as folder:
            with jupyter(Path(home)):
                execute(notebook, Path(folder))
            _presentable(notebook, Path(folder))
        nbformat.write(notebook, FOLDER / name)


if __name__ == "__main__":
    main()
