"""A run that writes checkpoints on its way, and the same run taken up again from one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Data, Net, run

from lora_lightning import LoraCallback


def lora() -> list[LoraCallback]:
    return [
        LoraCallback(
            r=2, lora_dropout=0.3, target_modules=["embed", "body.2"], modules_to_save=["head"]
        )
    ]


def every_step() -> ModelCheckpoint:
    return ModelCheckpoint(filename="{step}", save_top_k=-1, every_n_train_steps=1)


@dataclass(frozen=True)
class Run:
    """64 samples in batches of 16: four batches an epoch, for three epochs."""

    module: Callable[[], Any] = Net
    data: Callable[[], Any] = Data
    callbacks: Callable[[], list[Callback]] = list
    lora: Callable[[], list[Any]] = lora
    saver: Callable[[], ModelCheckpoint] = every_step
    options: dict[str, Any] = field(default_factory=dict)

    def fit(self, folder: Path, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
        """Everything that the run has in the end; a resumed one is another process with its luck."""
        seed_everything(7 if ckpt_path is None else 123, verbose=False)
        if ckpt_path is not None:
            torch.rand(5), np.random.rand(3)
        module, losses = self.module(), Losses()
        saver = self.saver()
        saver.dirpath = str(folder)
        trainer = run(
            folder,
            *self.lora(),
            *self.callbacks(),
            losses,
            saver,
            **{"max_epochs": 3, "num_sanity_val_steps": 0, **self.options, **options},
        )
        trainer.fit(module, self.data(), ckpt_path=ckpt_path)
        return {
            "weights": dict(module.state_dict()),
            "moments": [o.state_dict() for o in trainer.optimizers],
            "schedules": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "callbacks": {
                key: state
                for key, state in [
                    (c.state_key, c.state_dict())
                    for c in trainer.callbacks
                    if not isinstance(c, ModelCheckpoint)
                ]
                if state
            },
            "progress": [trainer.global_step, trainer.current_epoch],
            "losses": losses.seen,
        }


class Losses(Callback):
    """The loss of every batch, by its number in the run."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], float] = {}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen[trainer.current_epoch, batch_idx] = float(outputs["loss"]) if outputs else 0.0


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two nested states differ in any bit; of the losses, those that both runs saw."""
    if path == "/losses":
        first = {key: loss for key, loss in first.items() if key in second}
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return [f"{path}: {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [d for key in first for d in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return [f"{path}: {len(first)} and {len(second)}"]
        return [
            d
            for i, (a, b) in enumerate(zip(first, second, strict=True))
            for d in differences(a, b, f"{path}/{i}")
        ]
    return [] if first == second else [f"{path}: {first!r} and {second!r}"]
