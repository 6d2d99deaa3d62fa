"""Notebooks run top to bottom on this interpreter, show what they promise, and are stripped."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from tests.helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART = ROOT / "notebooks" / "01_quickstart.ipynb"
LANGUAGE_MODEL = ROOT / "notebooks" / "02_language_model.ipynb"
E2E = Path(os.environ.get("E2E_FILE") or ROOT.parent / "shared" / "data" / "e2e" / "valid.txt")


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """Jupyter as if freshly installed, whose one kernel is the interpreter that runs the tests."""
    home = tmp_path_factory.mktemp("jupyter")
    spec = home / "data" / "kernels" / "python3"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "Python 3", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CONFIG", "RUNTIME"):
            (home / name.lower()).mkdir(exist_ok=True)
            patch.setenv(f"JUPYTER_{name}_DIR", str(home / name.lower()))
        patch.setenv("IPYTHONDIR", str(home / "ipython"))
        patch.delenv("JUPYTER_PATH", raising=False)
        patch.delenv("MPLBACKEND", raising=False)
        yield


def execute(notebook, folder, expressions=()):
    """Run all cells in `folder`; return the values of `expressions` afterwards, by expression."""
    values = ", ".join(f"{text!r}: {text}" for text in expressions)
    probed = nbformat.from_dict({**notebook, "cells": [*notebook.cells]})
    probed.cells.append(new_code_cell(f"print({{{values}}})"))
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(probed, timeout=600, kernel_name="python3", resources=resources)
    client.execute()
    notebook.cells = probed.cells[:-1]
    return ast.literal_eval(probed.cells[-1].outputs[0].text)


def unstripped(notebook):
    """Numbers of the cells that hold something of an earlier run."""
    return [
        number
        for number, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None)
    ]


def images(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert unstripped(notebook) == []
    assert notebook.metadata.keys() <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in notebook.cells)


def test_there_are_notebooks():
    assert [QUICKSTART, LANGUAGE_MODEL] == NOTEBOOKS


@pytest.mark.soak
def test_quickstart(jupyter, tmp_path):
    notebook = nbformat.read(QUICKSTART, as_version=4)
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    lora = {f"new_lora().config.{name}": value for name, value in config["lora"].items()}
    task = {"module.model_name": config["model"]["init_args"]["model"]}
    task["module.learning_rate"] = config["model"]["init_args"]["learning_rate"]
    loop = {f"trainer.{key}": config["trainer"][key] for key in ("max_epochs", "gradient_clip_val")}
    loop["data.batch_size"] = config["data"]["init_args"]["batch_size"]
    same = {**lora, **task, **loop}
    results = ("accuracy", "reloaded_accuracy", "float(baseline)", "base_accuracy")
    values = execute(notebook, tmp_path, [*same, *results, "folder.exists()"])

    # The README's run and this one are the same.
    assert {key: values[key] for key in same} == same
    assert values["accuracy"] > 0.70  # head only: 0.60, tests/benchmarks/quickstart_methods.py
    assert values["accuracy"] == values["reloaded_accuracy"]
    # Neither guessing nor the base alone does anything like it.
    assert max(values["float(baseline)"], values["base_accuracy"]) < 0.30
    assert len(images(notebook)) == 3
    assert list(tmp_path.iterdir()) == []
    assert not values["folder.exists()"]


@pytest.mark.soak
def test_language_model(jupyter, tmp_path, monkeypatch):
    if not E2E.is_file():
        pytest.skip(f"the E2E data are not here: no {E2E.name} in E2E_FILE or beside the project")
    monkeypatch.setenv("E2E_FILE", str(E2E))
    notebook = nbformat.read(LANGUAGE_MODEL, as_version=4)
    comparison = {key: f"comparison.{key}" for key in ("base", "tuned", "standard_error", "helped")}
    curves = {name: f"losses({name})[1]" for name in ("pretraining", "tuning")}
    found = execute(notebook, tmp_path, [*comparison.values(), *curves.values()])

    for curve in curves.values():  # falling, all along
        assert found[curve] == sorted(found[curve], reverse=True)
    base, tuned = found["comparison.base"], found["comparison.tuned"]
    assert base.keys() >= {"val_loss", "val_perplexity"}
    assert base["val_loss"] - tuned["val_loss"] > 1.0 > 4 * found["comparison.standard_error"]
    assert found["comparison.helped"] is True
    assert tuned["val_loss"] == pytest.approx(found["losses(tuning)[1]"][-1], rel=1e-4)
    # What it is about is new to the base, which does worse there than where it was trained.
    assert base["val_loss"] > found["losses(pretraining)[1]"][-1] + 1.0
    assert len(images(notebook)) == 1
    shown = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "the adapter lowers val_loss by" in shown
    assert "The Punter" in shown


@pytest.mark.slow
def test_these_tests_can_fail(jupyter, tmp_path):
    raising = new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(raising, tmp_path)

    kernel = new_notebook(cells=[new_code_cell("import sys"), new_code_cell("'shown'")])
    assert execute(kernel, tmp_path, ["sys.executable"]) == {"sys.executable": sys.executable}
    assert images(kernel) == []
    assert unstripped(kernel) == [0, 1]
