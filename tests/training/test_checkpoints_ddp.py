"""Checkpoints that one process of several takes alone."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from lora_lightning import LoraCallback
from lora_lightning.checkpoint.state_dict import KEY
from tests.helpers.lightning_modules import OPTIONS, make_trainer, saved
from tests.helpers.processes import on_processes
from tests.helpers.resumable_run import OwnLuck, Shared, differences

LIMIT = timedelta(seconds=8)


def fit(folder: Path, *callbacks: Any, epochs: int = 1, ckpt_path: Path | None = None) -> Any:
    seed_everything(7 if ckpt_path is None else 8, verbose=False)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=LIMIT)
    lora = LoraCallback(lora_dropout=0.3, **OPTIONS)
    trainer = make_trainer(
        folder, lora, *callbacks, strategy=strategy, devices=2, max_epochs=epochs
    )
    trainer.fit(OwnLuck(), Shared(), ckpt_path=ckpt_path)
    return trainer


class DumpsAlone(Callback):
    def __init__(self, how: str, path: Path) -> None:
        self.how, self.path = how, path

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1 and trainer.is_global_zero:
            if self.how == "dump":
                trainer._checkpoint_connector.dump_checkpoint()
            else:
                trainer.save_checkpoint(self.path, weights_only=self.how == "weights")


def after_fit(folder: Path) -> Any:
    """Rank 0 saves alone, then all of them; another run goes on from either."""
    straight = fit(folder, epochs=2)
    trainer = fit(folder)
    torch.rand(3)  # whatever happens in between
    alone, dumped = folder / "alone.ckpt", folder / "dumped.ckpt"
    if trainer.is_global_zero:  # the barrier of Lightning's save_checkpoint waits for all
        torch.save(trainer._checkpoint_connector.dump_checkpoint(), dumped)
        content = trainer._checkpoint_connector.dump_checkpoint()
        trainer.strategy.save_checkpoint(content, alone)
    trainer.strategy.barrier()
    trainer.save_checkpoint(folder / "all.ckpt")
    ends = {}
    for name in ("alone", "dumped", "all"):
        resumed = fit(folder / name, epochs=2, ckpt_path=folder / f"{name}.ckpt")
        states = [t.lightning_module.state_dict() for t in (straight, resumed)]
        ends[name] = differences(*states)
    return ends


class DumpsAtTheEnd(Callback):
    """Rank 0 alone, in each hook after training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def dump(self, trainer: Any, where: str) -> None:
        if trainer.is_global_zero:
            content = trainer._checkpoint_connector.dump_checkpoint()
            torch.save(content, self.folder / f"{where}.ckpt")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.dump(trainer, "train_end")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.dump(trainer, "fit_end")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.dump(trainer, "teardown")


def at_the_end(folder: Path) -> Any:
    straight = fit(folder, epochs=2)
    lora = LoraCallback(lora_dropout=0.3, **OPTIONS)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=LIMIT)
    seed_everything(7, verbose=False)
    make_trainer(  # before LoraCallback, which has to be ready by then
        folder, DumpsAtTheEnd(folder), lora, strategy=strategy, devices=2, max_epochs=1
    ).fit(OwnLuck(), Shared())
    ends = {}
    for name in ("train_end", "fit_end", "teardown"):
        resumed = fit(folder / name, epochs=2, ckpt_path=folder / f"{name}.ckpt")
        states = [t.lightning_module.state_dict() for t in (straight, resumed)]
        ends[name] = differences(*states)
    return ends


def within(folder: Path, how: str) -> Any:
    began = time.monotonic()
    try:
        fit(folder, DumpsAlone(how, folder / "a.ckpt"))
    except Exception as error:
        if os.environ["RANK"] == "0":
            return type(error).__name__, str(error), time.monotonic() - began
    return None


@pytest.mark.slow
def test_after_fit_rank_zero_saves_alone(tmp_path: Path) -> None:
    for ends in on_processes(2, after_fit, tmp_path):
        assert ends == {"alone": [], "dumped": [], "all": []}
    assert len(saved(tmp_path / "alone.ckpt")[KEY]["processes"]) == 2


@pytest.mark.slow
def test_rank_zero_saves_alone_once_training_has_ended(tmp_path: Path) -> None:
    for ends in on_processes(2, at_the_end, tmp_path):
        assert ends == {"train_end": [], "fit_end": [], "teardown": []}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dump", "weights"])
def test_within_a_run_the_cause_is_named(tmp_path: Path, how: str) -> None:
    first, _ = on_processes(2, within, tmp_path, how)
    name, text, seconds = first
    assert name == "CheckpointError"
    assert "rank 0 takes a checkpoint within the run and waits for rank 1" in text
    assert "is_global_zero" in text
    assert seconds < 60
