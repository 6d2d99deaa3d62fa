"""Checkpoints that torch would not read with weights_only=True: said in time, or made plain."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning import LoraCallback, load_adapter, load_from_checkpoint, save_adapter
from lora_lightning.errors import CheckpointError
from tests.helpers.lightning_modules import OPTIONS, Data, Net, make_trainer, saved
from tests.helpers.resumable_run import differences

UNREADABLE = "Checkpoints of this run hold what torch does not load"


class CosineByNumpy(torch.optim.lr_scheduler.LRScheduler):
    """As in tutorials; from the first step on rates are numpy's."""

    def get_lr(self) -> Any:
        return [rate * 0.5 * (1 + np.cos(np.pi * self.last_epoch / 9)) for rate in self.base_lrs]


class Scheduled(Net):
    schedule: Any = CosineByNumpy

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=np.float64(0.01))
        scheduler = type(self).schedule(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fit(folder: Path, module: Any, *callbacks: Any, **options: Any) -> Any:
    seed_everything(1 if "ckpt_path" not in options else 2, verbose=False)
    ckpt = {"ckpt_path": options.pop("ckpt_path")} if "ckpt_path" in options else {}
    trainer = make_trainer(folder, LoraCallback(**OPTIONS), *callbacks, **options)
    trainer.fit(module, Data(), **ckpt)
    return trainer


def test_numbers_of_numpy_in_a_schedule(tmp_path: Path, recwarn: Any) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    straight = Scheduled()
    whole = fit(tmp_path, straight, saver, max_epochs=2)
    assert not [w for w in recwarn if UNREADABLE in str(w.message)]
    content = saved(tmp_path / "epoch=0-step=3.ckpt")
    assert type(content["lr_schedulers"][0]["_last_lr"][0]) is float
    assert type(whole.optimizers[0].param_groups[0]["lr"]) is np.float64  # the run's own stay
    resumed = Scheduled()
    path = tmp_path / "epoch=0-step=3.ckpt"
    again = fit(tmp_path / "b", resumed, max_epochs=2, ckpt_path=path)
    assert differences(straight.state_dict(), resumed.state_dict()) == []
    states = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (whole, again)]
    assert differences(*states) == []
    loaded = load_from_checkpoint(Scheduled, tmp_path / "epoch=1-step=6.ckpt")
    assert loaded.head.adapters["default"].module.weight.any()


class Best(Callback):
    """A state that is unreadable from the start, from the first validation on, or never."""

    def __init__(self, first: Any, later: Any) -> None:
        self.value, self.later = first, later

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.value = self.later

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}


STATES: dict[str, tuple[Any, Any, bool]] = {
    "array": (np.ones(2), np.ones(2), True),
    "path": (PurePosixPath("a"), PurePosixPath("b"), True),
    "later": (None, np.float32(1), True),
    "module": (nn.Linear(2, 2), nn.Linear(2, 2), True),
    "plain": ({"a": [1, torch.ones(2)]}, (None, "b", {1.5}), False),
}


@pytest.mark.parametrize(("first", "later", "said"), STATES.values(), ids=STATES)
def test_states_of_callbacks(
    tmp_path: Path, recwarn: Any, first: Any, later: Any, said: bool
) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    fit(tmp_path, Net(), Best(first, later), saver, max_epochs=3)
    found = [str(w.message) for w in recwarn if UNREADABLE in str(w.message)]
    assert len(found) == said  # once, whatever is written
    assert all("weights_only=True: callbacks['Best']." in message for message in found)
    path = tmp_path / "epoch=2-step=12.ckpt"
    if not said:
        assert saved(path)
        return
    with pytest.raises(Exception, match="Weights only load failed"):
        saved(path)


def test_it_is_said_before_the_first_batch(tmp_path: Path) -> None:
    class Never(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("too late")

    with (
        pytest.warns(UserWarning, match=r"does not load with weights_only=True: callbacks"),
        pytest.raises(AssertionError, match="too late"),
    ):
        fit(tmp_path, Never(), Best(np.ones(1), None))


def test_schedulers_optimizers_and_what_the_module_adds(tmp_path: Path) -> None:
    class Own(torch.optim.lr_scheduler.ConstantLR):
        def __init__(self, optimizer: Any) -> None:
            super().__init__(optimizer)
            self.table = np.ones(3)

    class Adds(Scheduled):
        schedule = Own

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["vocabulary"] = PurePosixPath("words.txt")

    with pytest.warns(UserWarning, match=UNREADABLE) as seen:
        fit(tmp_path, Adds(), ModelCheckpoint(tmp_path))
    messages = [str(w.message) for w in seen if UNREADABLE in str(w.message)]
    assert [m.partition("True: ")[2].partition(". ")[0] for m in messages] == [
        "lr_schedulers[0]",
        "vocabulary",
    ]


class OfNetwork(Net):
    """The network is a hyperparameter, as in several templates."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if body is not None:
            self.body = body


@pytest.mark.filterwarnings("ignore:OfNetwork keeps hyperparameters", "ignore:Attribute 'body' is")
def test_weights_only_false_reaches_all_that_reads(tmp_path: Path) -> None:
    module = OfNetwork(Net().body)
    trainer = fit(tmp_path, module)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    for read in (load_from_checkpoint, lambda _, path: load_adapter(Net(), path)):
        with pytest.raises(CheckpointError) as error:
            read(OfNetwork, path)
        assert "it holds torch.nn.modules" in str(error.value)
        assert "weights_only=False" in str(error.value)
    trained = module.state_dict()
    loaded = load_from_checkpoint(OfNetwork, path, weights_only=False)
    assert differences(trained, loaded.state_dict()) == []
    given = load_from_checkpoint(OfNetwork, path, body=Net().body, weights_only=False)
    assert differences(trained, given.state_dict()) == []
    save_adapter(loaded, tmp_path / "folder")
    for source, options in ((tmp_path / "folder", {}), (path, {"weights_only": False})):
        plain = Net()
        load_adapter(plain, source, **options)
        assert differences(trained, plain.state_dict()) == []
