"""A run is found by any of its names, and its module and data are made again as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lora_lightning import CausalLM
from lora_lightning.engine.switching import disable_adapter
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.runs.build import data_of, trained_module
from lora_lightning.runs.run import find_run


def test_by_directory_checkpoint_and_config(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = find_run(own_run)
    assert run.monitored
    assert run.checkpoint == own_run / "checkpoints/best.ckpt"
    assert run.config["model"]["class_path"] == "own_modules.Net"
    assert "ckpt_path" not in run.config  # which not all verbs take
    assert find_run(own_run, "last").checkpoint.name == "last.ckpt"
    lone = find_run(run.checkpoint)
    assert (lone.directory, lone.config) == (own_run, run.config)
    monkeypatch.chdir(own_run.parents[1])
    assert find_run("own.yaml").checkpoint.absolute() == run.checkpoint


def test_what_cannot_be_found(own_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run .*own2.*Did you mean .*own"):
        find_run(own_run.with_name("own2"))
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        find_run(tmp_path)
    (tmp_path / "a.yaml").write_text("trainer: {max_epochs: 1}")
    with pytest.raises(ConfigError, match="names no run directory"):
        find_run(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("trainer: [")
    with pytest.raises(ConfigError, match="cannot be read as a config"):
        find_run(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="is a checkpoint already"):
        find_run(own_run / "checkpoints/best.ckpt", "last")
    with pytest.raises(CheckpointError, match=r"Did you mean .*best.ckpt"):
        find_run(own_run, str(own_run / "checkpoints/bst.ckpt"))


def test_a_module_of_ones_own(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(own_run.parents[1])
    run = find_run(own_run)
    module, data = trained_module(run), data_of(run)
    assert not module.training
    assert type(data).__name__ == "Data"
    x = torch.randn(4, 8)
    found = module(x)
    with disable_adapter(module):
        assert not torch.equal(found, module(x))
    torch.testing.assert_close(trained_module(run, type(module))(x), found)
    torch.testing.assert_close(trained_module(run, type(module)())(x), found)


def test_a_task_needs_no_config(lm_run: Path, tmp_path: Path) -> None:
    shutil.copy(lm_run / "checkpoints/best.ckpt", tmp_path / "alone.ckpt")
    run = find_run(tmp_path / "alone.ckpt")
    assert run.config == {}
    module = trained_module(run)
    assert isinstance(module, CausalLM)
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(
        trained_module(find_run(lm_run))({"input_ids": ids}), module({"input_ids": ids})
    )


def test_what_does_not_say_its_module(own_run: Path, tmp_path: Path) -> None:
    shutil.copy(own_run / "checkpoints/best.ckpt", tmp_path / "alone.ckpt")
    with pytest.raises(ConfigError, match="does not say which module"):
        trained_module(find_run(tmp_path / "alone.ckpt"))


def test_the_config_of_a_fit_stays_through_evaluations(own_run: Path) -> None:
    content = yaml.safe_load((own_run / "config.yaml").read_text())
    assert content["trainer"]["default_root_dir"] == "runs/own"
    assert content["lora"]["r"] == 2
