"""A search for a learning rate or a batch size leaves no trace in the run that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lora_lightning.errors import ConfigError
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.resumable_run import Losses, ResumableRun, differences, lora

pytestmark = pytest.mark.filterwarnings("ignore:.*tqdm:DeprecationWarning")


class Tunable(Net):
    """Nothing but the found learning rate may differ, so this one does not use it."""

    lr = 1.0


def straight(folder: Path, *callbacks: Any) -> dict[str, Any]:
    return ResumableRun(Tunable, callbacks=lambda: list(callbacks), spots=()).fit(folder)


def finder(**options: Any) -> LearningRateFinder:
    return LearningRateFinder(num_training_steps=5, update_attr=False, **options)


def test_learning_rate_finder_as_a_callback(tmp_path: Path) -> None:
    plain = straight(tmp_path / "plain")
    searched = straight(tmp_path / "searched", finder())
    for part in ("weights", "optimizers", "schedules", "losses"):
        assert differences(plain[part], searched[part]) == [], part


def test_batch_size_finder_as_a_callback(tmp_path: Path) -> None:
    plain = straight(tmp_path / "plain")
    search = BatchSizeFinder(steps_per_trial=2, init_val=16, max_trials=0)
    searched = straight(tmp_path / "searched", search)
    for part in ("weights", "optimizers", "schedules", "losses"):
        assert differences(plain[part], searched[part]) == [], part


class LaterOnly(LearningRateFinder):
    """Searches at an epoch of its own choice, as Lightning's documentation shows."""

    def on_fit_start(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("kind", [LearningRateFinder, BatchSizeFinder])
def test_a_search_before_a_resume_is_refused(tmp_path: Path, kind: type) -> None:
    """Lightning's search restores a checkpoint of its own, and drops the one to resume from."""
    trainer = make_trainer(tmp_path, *lora(), max_epochs=1)
    trainer.fit(Tunable(), Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=f"{kind.__name__} searches again at the head of a res"):
        make_trainer(tmp_path, *lora(), kind(), max_epochs=2).fit(
            Tunable(), Data(), ckpt_path=tmp_path / "a.ckpt"
        )
    trainer = make_trainer(tmp_path, *lora(), LaterOnly(), max_epochs=2)
    trainer.fit(Tunable(), Data(), ckpt_path=tmp_path / "a.ckpt")
    assert trainer.global_step == 8


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_tuner_before_fit(tmp_path: Path, search: str) -> None:
    """From the same random state: a search gives back the one that it found."""

    def fit(searches: bool) -> dict[str, Any]:
        seed_everything(7, verbose=False)
        module, data, losses = Tunable(), Data(), Losses()
        trainer = make_trainer(tmp_path, *lora(), losses, max_epochs=2)
        if searches and search == "lr_find":
            Tuner(trainer).lr_find(module, data, num_training=5, update_attr=False)
        elif searches:
            Tuner(trainer).scale_batch_size(
                module, data, init_val=16, max_trials=0, steps_per_trial=2
            )
        seed_everything(7, verbose=False)  # of which adapters are drawn, too
        trainer.fit(module, data)
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        return {"weights": dict(module.state_dict()), "states": states, "seen": losses.seen}

    plain, searched = fit(False), fit(True)
    assert differences(plain, searched) == []
