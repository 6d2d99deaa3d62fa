"""A run that writes checkpoints at named spots, and the same run taken up again from one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback
from tests.helpers.lightning_modules import Data, Net, make_trainer

# In the middle of an epoch; after its last batch, before validation; after validation; at the end.
SPOTS = ("batch2", "batch4", "validated8", "end8", "batch9")


def lora() -> list[Any]:
    return [
        LoraCallback(
            r=2, lora_dropout=0.3, target_modules=["embed", "body.2"], modules_to_save=["head"]
        )
    ]


class OwnLuck(Net):
    """Every process has its own random numbers from the beginning."""

    def on_fit_start(self) -> None:
        torch.manual_seed(int(torch.randint(1000, ())) + self.global_rank)


class Shared(Data):
    """Eight batches an epoch, shared out by Lightning's DistributedSampler; noise as it loads."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__(batch_size=8)
        self.workers = workers

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, 8, shuffle=True, num_workers=self.workers)


class SaveAtSpots(Callback):
    """Writes checkpoints where ModelCheckpoint can, named by the batches that were trained on."""

    def __init__(self, folder: Path, spots: tuple[str, ...]) -> None:
        self.folder, self.spots = folder, spots

    def save(self, trainer: Any, where: str) -> None:
        spot = f"{where}{trainer.fit_loop.total_batch_idx + 1}"
        if spot in self.spots and not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{spot}.ckpt")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.save(trainer, "validated")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.save(trainer, "end")


class Losses(Callback):
    """The loss of every batch, by its place in the run."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], float] = {}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen[trainer.current_epoch, batch_idx] = float(outputs["loss"]) if outputs else 0.0


@dataclass(frozen=True)
class ResumableRun:
    """Three epochs of four batches, unless said otherwise; everything is made anew for each fit."""

    module: Callable[[], Any] = Net
    data: Callable[[], Any] = Data
    lora: Callable[[], list[Any]] = lora
    callbacks: Callable[[], list[Callback]] = list
    options: Callable[[], dict[str, Any]] = dict
    spots: tuple[str, ...] = SPOTS

    def fit(self, folder: Path, ckpt_path: Path | None = None) -> dict[str, Any]:
        """All that the run has in the end; a resumed one is another process with its own luck."""
        seed_everything(7 if ckpt_path is None else 123, verbose=False)
        if ckpt_path is not None:
            torch.rand(5), np.random.rand(3)
        module, losses = self.module(), Losses()
        callbacks = [*self.lora(), *self.callbacks(), losses, SaveAtSpots(folder, self.spots)]
        trainer = make_trainer(folder, *callbacks, **{"max_epochs": 3, **self.options()})
        trainer.fit(module, self.data(), ckpt_path=ckpt_path)
        others = [c for c in trainer.callbacks if not isinstance(c, ModelCheckpoint)]
        return {
            "weights": dict(module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedules": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "callbacks": {c.state_key: c.state_dict() for c in others},
            "progress": [trainer.global_step, trainer.current_epoch],
            "losses": losses.seen,
        }

    def check(self, folder: Path) -> None:
        """From every spot the run ends as the uninterrupted one does, bit for bit."""
        straight = self.fit(folder)
        assert {path.stem for path in folder.glob("*.ckpt")} >= set(self.spots)
        for spot in self.spots:
            resumed = self.fit(folder / spot, folder / f"{spot}.ckpt")
            assert differences(straight, resumed) == [], spot
            assert len(resumed["losses"]) < len(straight["losses"]), spot


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two nested states differ in any bit; of the losses, those that the second run saw."""
    if path == "/losses":
        first = {key: loss for key, loss in first.items() if key in second}
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if hasattr(first, "to_local"):
            first, second = first.to_local(), second.to_local()
        return [] if torch.equal(first, second) else [path]
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return [f"{path}: {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [d for key in first for d in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return [f"{path}: {len(first)} and {len(second)}"]
        pairs = enumerate(zip(first, second, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if first == second else [f"{path}: {first!r} and {second!r}"]
