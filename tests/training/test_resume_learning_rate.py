"""A learning rate that was changed before a resume: it has no effect, and a warning says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from lora_lightning import LoraCallback
from tests.helpers.lightning_modules import Data, Net, NetWithoutOptimizer, make_trainer

OPTIONS: dict[str, Any] = {"r": 2, "target_modules": ["embed"], "modules_to_save": ["head"]}


class Rated(Net):
    """Two parameter groups and a schedule of choice."""

    def __init__(self, lr: float, schedule: Any = None) -> None:
        super().__init__()
        self.lr, self.schedule = lr, schedule

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.embed.parameters(), "lr": self.lr},
            {"params": self.head.parameters(), "lr": 0.5},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1.0)
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "monitor": "loss"},
        }


def warmup(optimizer: Any) -> Any:
    return LinearLR(optimizer, 0.1, total_iters=9)


def plateau(optimizer: Any) -> Any:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)


def fit(folder: Path, epochs: int, module: Any, lr: float = 1e-3, ckpt: Any = None) -> list[float]:
    """Train to `epochs`; the learning rates at the end. Leaves `<epochs>.ckpt`."""
    trainer = make_trainer(folder, LoraCallback(lr=lr, **OPTIONS), max_epochs=epochs)
    trainer.fit(module, Data(), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return [group["lr"] for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize("schedule", [None, warmup, plateau])
def test_a_changed_rate_is_said_to_have_no_effect(tmp_path: Path, schedule: Any) -> None:
    fit(tmp_path, 2, Rated(0.25, schedule))
    straight = fit(tmp_path, 3, Rated(0.25, schedule), ckpt=tmp_path / "2.ckpt")
    text = "The learning rate 0.125 of this run has no effect: .* started from 0.25. To train"
    with pytest.warns(UserWarning, match=text):
        assert fit(tmp_path, 3, Rated(0.125, schedule), ckpt=tmp_path / "2.ckpt") == straight
    with pytest.warns(UserWarning, match=text):  # the checkpoint knows what it goes on from
        fit(tmp_path, 4, Rated(0.125, schedule), ckpt=tmp_path / "3.ckpt")


def test_the_callbacks_own_rate(tmp_path: Path) -> None:
    fit(tmp_path, 1, NetWithoutOptimizer(), 0.25)
    with pytest.warns(UserWarning, match="The learning rate 0.125 of this run has no effect"):
        rates = fit(tmp_path, 2, NetWithoutOptimizer(), 0.125, tmp_path / "1.ckpt")
    assert rates == [0.25]


def test_the_advice_works(tmp_path: Path) -> None:
    fit(tmp_path, 1, Rated(0.25))
    lora = LoraCallback(init_from=str(tmp_path / "1.ckpt"))
    trainer, module = make_trainer(tmp_path, lora, max_epochs=1), Rated(0.125)
    trained = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    trainer.validate(module, Data(), verbose=False)
    assert all(torch.equal(module.state_dict()[key], trained[key]) for key in trained)
    trainer.fit(module, Data())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.125, 0.5]


@pytest.mark.parametrize("schedule", [None, warmup, plateau])
def test_the_same_rate_is_no_matter(tmp_path: Path, schedule: Any) -> None:
    straight = fit(tmp_path, 3, Rated(0.25, schedule))
    fit(tmp_path, 2, Rated(0.25, schedule))
    resumed = fit(
        tmp_path, 3, Rated(0.25, schedule), ckpt=tmp_path / "2.ckpt"
    )  # warnings are errors
    assert resumed == straight
