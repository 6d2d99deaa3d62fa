"""One message, before the first step, of what Lightning finds late or says at length."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lightning.cli.early_checks import nothing_left
from tests.helpers.command import run_command
from tests.helpers.paths import ROOT, child_environment

CONFIG: dict[str, Any] = {
    "lora": {"r": 2, "modules_to_save": ["head"]},
    "model": {"class_path": "modules.Net"},
    "data": {"class_path": "modules.Data"},
    "compare_with_base": False,
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "default_root_dir": "runs/a",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "modules.py").write_text((ROOT / "tests/helpers/lightning_modules.py").read_text())
    write(tmp_path / "my.yaml", CONFIG)
    return tmp_path


def write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(config))


@pytest.fixture
def cli(folder: Path, monkeypatch: Any, capfd: Any) -> Any:
    return partial(run_command, folder, monkeypatch, capfd)


def monitors(kind: str, metric: str) -> list[str]:
    return [f"--trainer.callbacks+={kind}", f"--trainer.callbacks.monitor={metric}"]


@pytest.mark.parametrize("kind", ["EarlyStopping", "ModelCheckpoint"])
def test_a_misspelt_monitor_ends_before_the_first_step(cli: Any, folder: Path, kind: str) -> None:
    text = cli("fit", "--config", "my.yaml", *monitors(kind, "vall_los"), fails=1)
    assert text.splitlines()[-1] == (
        f"lora-lightning: ConfigError: {kind} monitors 'vall_los', which the module does not log. "
        "Did you mean 'val_loss'? Logged are: val_loss. (trainer.callbacks)"
    )
    assert not list(folder.rglob("*.ckpt"))
    assert "trainable" not in text  # said when training begins


@pytest.mark.parametrize("kind", ["EarlyStopping", "ModelCheckpoint"])
def test_a_metric_that_never_comes_is_one_line(cli: Any, kind: str) -> None:
    """Nothing like it is logged by the validation; it could have been one of training."""
    text = cli("fit", "--config", "my.yaml", *monitors(kind, "accuracy"), fails=1)
    assert "Traceback" not in text
    (line,) = (line for line in text.splitlines() if "ConfigError" in line)
    assert f"{kind} monitors 'accuracy', which the module does not log." in line
    assert "loss, val_loss. (trainer.callbacks)" in line


@pytest.mark.parametrize("metric", ["loss", "val_loss"])
def test_what_is_logged_may_be_monitored(cli: Any, metric: str) -> None:
    """`loss` is of training: no validation knows it."""
    cli("fit", "--config", "my.yaml", *monitors("ModelCheckpoint", metric))


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_without_its_package(cli: Any, monkeypatch: Any, folder: Path) -> None:
    text = cli("fit", "--config", "my.yaml", "--trainer.logger", "WandbLogger", fails=1)
    assert text.splitlines()[-1] == (
        "lora-lightning: ConfigError: WandbLogger needs the package wandb, which is not installed: "
        "pip install wandb (trainer.logger)"
    )
    text = cli("fit", "--config", "my.yaml", "--trainer.logger", "CSVLogger", fails=2)
    assert "CSVLogger: it needs --trainer.logger.save_dir VALUE. (trainer.logger)" in text
    assert len(text.splitlines()) == 2


def test_files_of_ones_own(cli: Any, folder: Path) -> None:
    write(folder / "no_file.yaml", {**CONFIG, "model": {"class_path": "modulse.Net"}})
    text = cli("fit", "--config", "no_file.yaml", fails=2)
    assert "model: there is no module 'modulse' for 'modulse.Net': it is not installed" in text
    assert f"no modulse.py in {str(folder)!r}" in text
    assert f"Did you mean {str(folder / 'modules.py')!r}? (model.class_path)" in text
    assert len(text.splitlines()) == 2
    (folder / "broken.py").write_text("import surely_not_installed\n")
    write(folder / "imports.yaml", {**CONFIG, "model": {"class_path": "broken.Net"}})
    text = cli("fit", "--config", "imports.yaml", fails=2)
    assert "model: broken.Net imports 'surely_not_installed', which is not installed." in text
    (folder / "mine.py").write_text("class Here:\n    pass\n")
    write(folder / "no_class.yaml", {**CONFIG, "model": {"class_path": "mine.Xyz"}})
    text = cli("fit", "--config", "no_class.yaml", fails=2)
    assert f"there is no class 'mine.Xyz'. {folder / 'mine.py'} defines Here." in text
    assert len(text.splitlines()) == 2


def test_nothing_is_left_to_train(cli: Any, folder: Path) -> None:
    cli("fit", "--config", "my.yaml")
    done = "nothing left to train: max_epochs=1 is reached (raise trainer.max_epochs)"
    for arguments in (["--config", "my.yaml", "--ckpt_path", "last"], ["runs/a"]):
        text = cli("fit", *arguments)
        assert done in text
        assert "trainable" not in text
    assert len(list(folder.rglob("*.ckpt"))) == 1
    text = cli("fit", "runs/a", "--trainer.max_steps", "3")
    assert done in text
    (path,) = folder.rglob("*.ckpt")
    assert nothing_left(path, {"max_epochs": 2, "max_steps": 4}) == (
        "nothing left to train: max_steps=4 is reached (raise trainer.max_steps)"
    )
    for limits in ({"max_epochs": 2, "max_steps": -1}, {"max_epochs": -1}, {"max_epochs": None}):
        assert nothing_left(path, limits) is None
    text = cli("fit", "runs/a", "--trainer.max_epochs", "2")
    assert "trainable" in text


def test_nothing_is_left_behind_the_last_batch(cli: Any, folder: Path) -> None:
    """The newest checkpoint is of a validation that came before the end of its epoch."""
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"monitor": "val_loss", "save_last": True},
    }
    trainer = {**CONFIG["trainer"], "callbacks": [saver], "val_check_interval": 0.5}
    write(folder / "halves.yaml", {**CONFIG, "trainer": trainer})
    cli("fit", "--config", "halves.yaml")
    assert "nothing left to train: max_epochs=1 is reached" in cli("fit", "runs/a")
    assert "trainable" in cli("fit", "runs/a", "--trainer.max_epochs", "2")


@pytest.mark.slow
def test_as_a_process(folder: Path) -> None:
    """A wrong format of the data, and a file that is none: a line or two each."""
    command = [sys.executable, "-c", "from lora_lightning.cli.main import main; main()"]
    (folder / "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    for arguments, wanted in (
        (["--config", "sft", "--data.format", "mesages", "--data.train", "my.jsonl"], "mesages"),
        (["--config", "my.yaml", *monitors("EarlyStopping", "val_los")], "'val_loss'?"),
    ):
        done = subprocess.run(
            [*command, "fit", *arguments, "--trainer.accelerator=cpu"],
            cwd=folder,
            env=child_environment(COLUMNS="80", PATH=os.environ["PATH"], HF_HUB_OFFLINE="1"),
            capture_output=True,
            text=True,
            check=False,
        )
        text = done.stdout + done.stderr
        assert done.returncode in (1, 2), text
        assert wanted in text
        assert "Traceback" not in text
        assert len(text.splitlines()) <= 4, text
