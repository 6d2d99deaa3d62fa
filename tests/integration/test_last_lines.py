"""From the first command to a merged model by the last lines alone: each is run as it is printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.paths import ROOT, child_environment
from tests.helpers.tiny_lm import tiny_llama
from tests.helpers.trained_runs import LANGUAGE_MODEL, OWN_MODULE, chat_rows

COMMAND = str(Path(sys.executable).parent / "lora-lightning")
# What cannot be told from a run: what to predict.
GIVEN = {"FILE": "more.jsonl"}


def run(folder: Path, call: str, said: str = "") -> str:
    """What a command prints that is typed as `call`; `said` is its standard input."""
    words = [GIVEN.get(word, word) for word in shlex.split(call)]
    assert words[0].endswith("lora-lightning")
    environment = child_environment(COLUMNS="80", HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [COMMAND, *words[1:]],
        cwd=folder,
        env=environment,
        input=said,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{call}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def next_commands(output: str) -> list[str]:
    """The commands that stand, indented, below `to ...:`."""
    last = output[output.index("to use it") :]
    return re.findall(r"^  (\S*lora-lightning .*)$", last, re.MULTILINE)


def follow(folder: Path, output: str, verbs: list[str]) -> dict[str, str]:
    """Run all that the last lines name, which must be `verbs`; what each prints."""
    calls = next_commands(output)
    found = {shlex.split(call)[1]: call for call in calls}
    assert [*found] == verbs, calls
    return {verb: run(folder, call, said="After one\n") for verb, call in found.items()}


def write(folder: Path, config: dict[str, Any], name: str) -> None:
    (folder / name).write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_of_a_language_model(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base", "chatml")
    for name in ("chats.jsonl", "more.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + os.linesep for row in chat_rows()))
    write(tmp_path, LANGUAGE_MODEL, "lm.yaml")
    first = run(tmp_path, "lora-lightning fit --config lm.yaml")
    shown = follow(
        tmp_path,
        first,
        ["generate", "predict", "merge", "export", "report", "fit", "validate"],
    )
    assert (tmp_path / "runs/lm/merged/config.json").is_file()
    assert (tmp_path / "runs/lm/peft/adapter_config.json").is_file()
    assert (tmp_path / "runs/lm/report.html").is_file()
    assert "val_loss" in shown["validate"]
    assert run(tmp_path, "lora-lightning inspect runs/lm runs/lm/peft")
    assert "learned" in run(tmp_path, "lora-lightning preview runs/lm")
    assert "fits" in run(tmp_path, "lora-lightning plan runs/lm --memory 4GB")


@pytest.mark.slow
def test_of_a_module_of_ones_own(tmp_path: Path) -> None:
    source = ROOT / "tests/helpers/lightning_modules.py"
    (tmp_path / "own_modules.py").write_text(source.read_text())
    write(tmp_path, OWN_MODULE, "own.yaml")
    first = run(tmp_path, "lora-lightning fit --config own.yaml")
    verbs = [shlex.split(call)[1] for call in next_commands(first)]
    assert verbs[-5:] == ["merge", "export", "report", "fit", "validate"]
    follow(tmp_path, first, verbs)
    assert run(tmp_path, "lora-lightning inspect runs/own")
    assert run(tmp_path, "lora-lightning preview runs/own")
    assert run(tmp_path, "lora-lightning plan runs/own")


@pytest.mark.soak
def test_of_the_quickstart(tmp_path: Path) -> None:
    quick = "--trainer.limit_train_batches 8 --trainer.limit_val_batches 4"
    first = run(tmp_path, f"lora-lightning fit --config quickstart {quick}")
    verbs = [shlex.split(call)[1] for call in next_commands(first)]
    assert verbs[-5:] == ["merge", "export", "report", "fit", "validate"]
    follow(tmp_path, first, verbs)
    assert run(tmp_path, "lora-lightning inspect runs/quickstart")
    assert "tkinter" in run(tmp_path, "lora-lightning preview runs/quickstart")
    assert run(tmp_path, "lora-lightning plan runs/quickstart")
