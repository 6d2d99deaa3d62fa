"""A run is found by any of its names, and its module and data are made again as they were."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lora_lightning import CausalLM
from lora_lightning.engine.switching import adapter_names, disable_adapter
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.runs.build import data_of, trained_module
from lora_lightning.runs.run import find_run
from tests.helpers.trained_runs import OWN_MODULE, fit


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


def test_without_a_metric_nothing_is_the_best(own_run: Path, tmp_path: Path) -> None:
    content = torch.load(own_run / "checkpoints/last.ckpt", weights_only=True)
    del content["lora_lightning"]["content"]  # hashes of what is changed here
    [(key, state)] = [
        item for item in content["callbacks"].items() if item[0].startswith("ModelCheckpoint")
    ]
    blind = {**state, "monitor": None, "best_model_path": "/x/last.ckpt"}
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(own_run / "checkpoints/best.ckpt", tmp_path / "checkpoints/best.ckpt")
    os.utime(tmp_path / "checkpoints/best.ckpt", (1, 1))
    for callbacks, name in (
        ({"ModelCheckpoint{1}": blind}, "last.ckpt"),
        ({"ModelCheckpoint{1}": blind, key: state}, "best.ckpt"),
    ):
        place = tmp_path / "checkpoints/last.ckpt"
        torch.save({**content, "callbacks": callbacks}, place)
        for asked in ("best", None):
            found = find_run(tmp_path, asked)
            assert (found.checkpoint.name, found.monitored) == (name, name == "best.ckpt")


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


def test_an_instance_stays_as_it_is(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(own_run.parents[1])
    from own_modules import Data, Net

    from lora_lightning import LoraCallback

    run, x = find_run(own_run), torch.randn(4, 8)
    wanted = trained_module(run)(x)
    module = Net()
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[LoraCallback(r=3)],
    ).fit(module, Data())  # fmt: skip
    state = {key: value.clone() for key, value in module.state_dict().items()}
    for _ in range(2):  # a notebook calls one verb after the other
        torch.testing.assert_close(trained_module(run, module)(x), wanted)
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert module.training
    assert module.trainer is not None
    assert adapter_names(module) == ["default"]


LATE = """
import torch
from torch import nn
from own_modules import Data, Net


class Late(Net):
    def __init__(self):
        super().__init__()
        self.head = None

    def configure_model(self):
        if self.head is None:
            self.head = nn.Linear(16, 3)  # drawn at random, from the seed of the run


class SetUp(Late):
    def configure_model(self):
        pass

    def setup(self, stage):
        Late.configure_model(self)


class Asking(SetUp):
    def setup(self, stage):
        self.trainer.datamodule
        super().setup(stage)
"""


@pytest.mark.parametrize("kind", ["Late", "SetUp"])
def test_layers_that_hooks_make(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = own_run.parents[1]
    (folder / "late_modules.py").write_text(LATE)
    monkeypatch.syspath_prepend(folder)
    config = {
        **OWN_MODULE,
        "seed_everything": 3,
        "lora": {"r": 2, "target_modules": "all-linear"},
        "model": {"class_path": f"late_modules.{kind}"},
        "trainer": {**OWN_MODULE["trainer"], "default_root_dir": f"runs/{kind}"},
    }
    run = find_run(fit(folder, config))
    module = trained_module(run)
    assert "default" in module.head.adapters
    if kind == "SetUp":
        text = yaml.safe_load((folder / "runs/SetUp/config.yaml").read_text())
        text["model"]["class_path"] = "late_modules.Asking"
        with pytest.raises(ConfigError, match=r"Asking has no 'head' before setup\(\), which fail"):
            trained_module(replace(run, config=text))


def test_classes_that_are_not_there(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = find_run(own_run)
    lost = replace(run, config={**run.config, "model": {"class_path": "lost_modules.Net"}})
    with pytest.raises(ConfigError, match=r"no module 'lost_modules' .*PYTHONPATH. \(model\)"):
        trained_module(lost)
    monkeypatch.syspath_prepend(own_run.parents[1])
    with pytest.raises(ConfigError, match=r"no class 'Nett'. Did you mean 'Net'\? \(module\)"):
        trained_module(run, "own_modules.Nett")
    with pytest.raises(ConfigError, match=r"'Net' is no import path .*\(module\)"):
        trained_module(run, "Net")
    with pytest.raises(ConfigError, match="int is no LightningModule"):
        trained_module(run, 3)
    with pytest.raises(ConfigError, match="Path is no LightningModule"):
        trained_module(run, Path)
    (own_run.parents[1] / "needing.py").write_text(
        "from own_modules import Net\n\nclass Needing(Net):\n"
        "    def __init__(self, wide):\n        super().__init__(wide)\n"
    )
    with pytest.raises(ConfigError, match=r"Needing cannot be made again: .*'wide'.*\(module\)"):
        trained_module(run, "needing.Needing")
    x = torch.randn(4, 8)
    torch.testing.assert_close(trained_module(run, "own_modules.Net")(x), trained_module(run)(x))
    assert type(data_of(run, "own_modules.Data")).__name__ == "Data"
    other = replace(run, config={**run.config, "model": {"class_path": "own_modules.Net",
                                                         "init_args": {"wdth": 3}}})  # fmt: skip
    with pytest.raises(ConfigError, match=r"does not fit its classes any more: .*wdth"):
        trained_module(other)
