"""`lora-lightning examine`: the module of a config, and an exit code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lightning.cli import examination
from tests.helpers.command import run_command
from tests.helpers.paths import ROOT

CONFIG: dict[str, Any] = {
    "lora": {"r": 2, "lora_dropout": 0.1, "modules_to_save": ["head"]},
    "model": {"class_path": "examined_modules.Net"},
    "data": {"class_path": "examined_modules.Data", "init_args": {"batch_size": 8}},
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": "runs/a"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examined_modules.py").write_text(
        (ROOT / "tests/helpers/lightning_modules.py").read_text()
        + "\n\nimport os\n\n\nclass OfThisProcess(Net):\n"
        "    def predict_step(self, batch, batch_idx):\n"
        "        return self(batch[0]) + os.getpid()\n"
        "\n\nclass Drawn(Net):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embed.reset_parameters()  # by the global generator, as most modules\n"
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.syspath_prepend(tmp_path)
    examination._BUILT.clear()
    return tmp_path


@pytest.mark.slow
def test_what_a_config_describes(folder: Path, monkeypatch: Any, capfd: Any) -> None:
    arguments = ("examine", "--config", "c.yaml", "--model", "examined_modules.Drawn")
    output = run_command(folder, monkeypatch, capfd, *arguments)
    assert output.count("│ yes   │") == 13
    assert "8 optimizer steps" in output
    assert "GPU available" not in output.partition("examination")[2]
    assert {*os.listdir(folder)} - {"__pycache__"} == {"c.yaml", "examined_modules.py"}


@pytest.mark.slow
def test_what_does_not_hold_is_an_exit_code(folder: Path, monkeypatch: Any, capfd: Any) -> None:
    options = ("--model", "examined_modules.OfThisProcess", "--batches", "3")
    output = run_command(
        folder, monkeypatch, capfd, "examine", "--config", "c.yaml", *options, fails=1
    )
    assert output.count("│ yes   │") == 12
    assert "6 optimizer steps" in output
    (line,) = (line for line in output.splitlines() if "NO" in line)
    assert "evaluation in a fresh process" in line
    assert "predict: predictions" in line


def test_errors_are_those_of_the_command(folder: Path, monkeypatch: Any, capfd: Any) -> None:
    options = ("--lora.target_modules", "[nothing]")
    output = run_command(
        folder, monkeypatch, capfd, "examine", "--config", "c.yaml", *options, fails=1
    )
    assert "TargetError" in output
    output = run_command(
        folder, monkeypatch, capfd, "examine", "--config", "c.yaml", "--lora.rank", "3", fails=2
    )
    assert "Did you mean" in output
