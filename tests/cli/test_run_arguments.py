"""A run directory in the place of config and checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lora_lightning.cli.options import Known, Option, Verb
from lora_lightning.cli.quick_check import check_arguments
from lora_lightning.cli.run_arguments import with_run
from lora_lightning.errors import ConfigError
from tests.helpers.command import run_command
from tests.helpers.trained_runs import own_module_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_module_run(tmp_path_factory.mktemp("run"))


def test_which_config_and_checkpoint(run: Path) -> None:
    config, checkpoints = ["--config", str(run / "config.yaml")], run / "checkpoints"
    best = [*config, "--ckpt_path", str(checkpoints / "best.ckpt")]
    assert with_run(["test", str(run), "--a", "b"]) == ["test", *best, "--a", "b"]
    last = [*config, "--ckpt_path", str(checkpoints / "last.ckpt")]
    assert with_run(["fit", str(run)]) == ["fit", *last]
    assert with_run(["examine", str(run)]) == ["examine", *config]
    named = [str(run), "--ckpt_path", "last"]
    assert with_run(["predict", *named]) == ["predict", *config, *named[1:]]
    plain = ["fit", "--config", "a.yaml"]
    assert with_run(plain) == plain


def test_a_run_of_python(run: Path, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    with pytest.raises(ConfigError, match=r"no config.yaml of .*--config FILE --ckpt_path"):
        with_run(["validate", str(tmp_path)])


def test_a_run_goes_on_and_is_evaluated(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = run.parents[1]
    monkeypatch.syspath_prepend(folder)
    before = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"]
    output = run_command(folder, monkeypatch, capfd, "fit", "runs/own", "--trainer.max_epochs=2")
    assert "adapter" in output
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == before + 1
    output = run_command(folder, monkeypatch, capfd, "validate", "runs/own")
    assert "val_loss" in output
    assert "before any fine-tuning" not in output


def test_nothing_but_a_run(run: Path) -> None:
    known = Known({"validate": Verb("", runs=True), "report": Verb("")})
    for verb in known.verbs:
        check_arguments(verb, [str(run)], [], known)


def test_what_may_be_left_out_is_not_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    options = (Option("run", positional=True, required=True), Option("others", positional=True,
                                                                     several=True))  # fmt: skip
    with pytest.raises(SystemExit):
        check_arguments("report", [], [], Known({"report": Verb("", options)}))
    assert "arguments are required: run\n" in capfd.readouterr().err


def test_a_module_that_is_not_in_the_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "deeper/config.yaml"
    config.parent.mkdir()
    text = (run / "config.yaml").read_text()
    config.write_text(text.replace("own_modules.Net", "lost_modules.Net"))
    output = run_command(tmp_path, monkeypatch, capfd, "validate", "--config", str(config), fails=2)
    assert f"no lost_modules.py in {str(tmp_path)!r}, where the command runs" in output


def test_only_verbs_that_go_with_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = run.parents[1]
    monkeypatch.syspath_prepend(folder)
    common = ["fit", "--config", "own.yaml", "--compare_with_base", "false"]
    place = ["--trainer.default_root_dir", "runs/full"]
    output = run_command(folder, monkeypatch, capfd, *common, *place, "--lora.enabled", "false")
    assert "lora-lightning fit runs/full" in output
    assert "merge" not in output
    assert "report" not in output
    place = ["--trainer.default_root_dir", "runs/light"]
    light = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true"]
    text = yaml.safe_load((folder / "own.yaml").read_text())
    text["trainer"]["callbacks"] = []
    (folder / "light.yaml").write_text(yaml.safe_dump(text))
    common[2] = "light.yaml"
    output = run_command(folder, monkeypatch, capfd, *common, *place, *light)
    assert "lora-lightning merge runs/light" in output
    assert "to go on" not in output  # no optimizer to go on with
