"""What the command shows of a run where there is no terminal, and its last lines."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_lightning import CausalLM, LoraConfig, TextDataModule, inject_adapter
from lora_lightning.cli import last_lines
from lora_lightning.cli.last_lines import to_use_it
from tests.helpers import trained_runs
from tests.helpers.command import run_command
from tests.helpers.lightning_modules import Data, Net
from tests.helpers.paths import ROOT, child_environment

CONFIG = trained_runs.OWN_MODULE
SHOWN = {k: v for k, v in CONFIG["trainer"].items() if k != "enable_progress_bar"}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: Any, capfd: Any) -> Any:
    source = ROOT / "tests/helpers/lightning_modules.py"
    (tmp_path / "own_modules.py").write_text(source.read_text())
    return partial(run_command, tmp_path, monkeypatch, capfd)


def config(folder: Path, **trainer: Any) -> list[str]:
    import yaml

    (folder / "my.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": {**SHOWN, **trainer}}))
    return ["fit", "--config", "my.yaml", "--compare_with_base", "false"]


def steps(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("step ")]


@pytest.mark.parametrize("enabled", [None, True])
def test_lines_in_the_place_of_a_bar(cli: Any, tmp_path: Path, enabled: bool | None) -> None:
    arguments = config(tmp_path, log_every_n_steps=2, enable_progress_bar=enabled)
    out = cli(*arguments)
    assert [line.split("  ")[0] for line in steps(out)] == ["step 2/4", "step 4/4", "step 4/4"]
    assert not {"\x1b", "\r"} & {*out}
    assert "eval mode" not in out  # of the BatchNorm, which is kept so
    # Nothing of it stands in the way of the next call.
    assert steps(cli("fit", "runs/own", "--trainer.max_epochs", "2"))[0].startswith("step 6/8")


def test_a_bar_of_ones_own(cli: Any, tmp_path: Path) -> None:
    bar = {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}
    out = cli(*config(tmp_path, callbacks=[*SHOWN["callbacks"], bar], log_every_n_steps=1))
    assert steps(out) == []
    assert "Epoch 0: 100%" in out


def test_no_progress_is_asked_for(cli: Any, tmp_path: Path) -> None:
    assert steps(cli(*config(tmp_path, enable_progress_bar=False, log_every_n_steps=1))) == []


def test_nothing_is_said_of_evaluating_without_validation(cli: Any, tmp_path: Path) -> None:
    out = cli(*config(tmp_path, limit_val_batches=0, callbacks=None))
    assert "best" not in out  # nothing is monitored
    assert "\nto go on:\n" in out
    assert "to evaluate" not in out


def test_only_verbs_that_there_are(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["lora-lightning"])
    monkeypatch.setattr(last_lines, "VERBS", ())
    run = Path("runs/a b")
    assert to_use_it(Net(), None, run) == []
    assert to_use_it(Net(), Data(), run) == [
        "to use it (predict):\n  lora-lightning predict 'runs/a b'"
    ]
    monkeypatch.setattr(last_lines, "VERBS", ("export", "generate", "merge", "plan", "report"))
    module, data = CausalLM("none"), TextDataModule("none.jsonl")
    assert to_use_it(module, data, Path("runs/x"), frozenset({"report"})) == [
        "to use it (chat, predict, whole model, PEFT folder):\n"
        "  lora-lightning generate runs/x\n"
        "  lora-lightning predict runs/x --data.predict FILE\n"
        "  lora-lightning merge runs/x runs/x/merged\n"
        "  lora-lightning export runs/x runs/x/peft"
    ]
    own = to_use_it(Net(), Data(), Path("runs/x"))[0]
    assert "generate" not in own
    assert "merge runs/x runs/x/merged/model.ckpt" in own  # beside no checkpoint
    two = Net()
    for name in ("one", "two"):
        inject_adapter(two, LoraConfig(target_modules=["head"], r=2), name)
    lines = to_use_it(two, Data(), Path("runs/x"))[0]
    assert "export runs/x runs/x/peft --adapter one" in lines  # which has to be said
    small = CausalLM("none", quantize="nf4")
    assert "merge runs/x runs/x/merged --dequantize\n" in to_use_it(small, data, Path("runs/x"))[0]


@pytest.mark.slow
def test_a_language_model_through_a_pipe(tmp_path: Path, monkeypatch: Any) -> None:
    """In a process of its own: bars of other packages are noticed when these are imported."""
    options = dict(trained_runs.LANGUAGE_MODEL["trainer"])
    del options["enable_progress_bar"]
    monkeypatch.setitem(trained_runs.LANGUAGE_MODEL, "trainer", options)
    trained_runs.language_model_run(tmp_path)
    command = [str(Path(sys.executable).parent / "lora-lightning"), "fit", "runs/lm"]
    done = subprocess.run(
        [*command, "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "2"],
        cwd=tmp_path, env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    out = done.stdout + done.stderr
    assert done.returncode == 0, out
    assert not {"\x1b", "\r"} & {*out}
    assert "Restoring states" not in out
    lines = [line.split("  ") for line in steps(out) if "val_loss" not in line]
    assert [line[0] for line in lines] == [f"step {n}/8" for n in (6, 8)]
    assert [[item.split(" ")[-1] for item in line[3:4]] for line in lines] == 2 * [["tokens/s"]]
