"""Notebooks run top to bottom on this interpreter, and are committed with what they show."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from tests.helpers import notebooks
from tests.helpers.notebooks import E2E, FOLDER, execute, images
from tests.helpers.paths import ROOT

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICKSTART, LANGUAGE_MODEL, AFTER = (
    FOLDER / f"{name}.ipynb" for name in ("01_quickstart", "02_language_model", "03_after_training")
)
WITH_PICTURES = {QUICKSTART: 3, LANGUAGE_MODEL: 1, AFTER: 2}


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    with notebooks.jupyter(tmp_path_factory.mktemp("jupyter")):
        yield


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_with_what_it_shows(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 500_000
    assert notebook.metadata.keys() <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert len(images(notebook)) == WITH_PICTURES[path]
    assert all(len(base64.b64decode(image)) < 100_000 for image in images(notebook))
    text = path.read_text()
    for elsewhere in (str(Path.home()), str(ROOT), "/tmp/", "site-packages", "Traceback"):
        assert elsewhere not in text, elsewhere


def test_there_are_notebooks():
    assert list(WITH_PICTURES) == NOTEBOOKS


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


@pytest.mark.soak
def test_after_training(jupyter, tmp_path):
    notebook = nbformat.read(AFTER, as_version=4)
    results = ("texts", "merged.saved.largest", "written.shape[1] > prompt['input_ids'].shape[1]")
    values = execute(notebook, tmp_path, results)
    assert values["texts"] == {"base": "thirty two", "default": "thirty"}
    assert values["merged.saved.largest"] < 1e-5
    assert values[results[2]]
    assert (tmp_path / "runs/before/report.html").is_file()
    for form in ("peft", "portable"):
        assert (tmp_path / f"out/{form}/adapter_model.safetensors").is_file()
    assert len(images(notebook)) == 2


@pytest.mark.slow
def test_these_tests_can_fail(jupyter, tmp_path):
    raising = new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(raising, tmp_path)

    kernel = new_notebook(cells=[new_code_cell("import sys"), new_code_cell("'shown'")])
    assert execute(kernel, tmp_path, ["sys.executable"]) == {"sys.executable": sys.executable}
    assert images(kernel) == []
