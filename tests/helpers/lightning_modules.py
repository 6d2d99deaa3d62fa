"""LightningModules of users who have never heard of LoRA, and data for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import (
    LoraCallback,
)


class Net(LightningModule):
    """Dropout, BatchNorm and a head: everything that can go wrong in a small space."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        generator = torch.random.fork_rng()
        with generator:
            torch.manual_seed(42)  # stands for pretrained weights: the same in every process
            self.embed = nn.Linear(8, width)
            self.norm = nn.BatchNorm1d(width)
            self.body = nn.Sequential(
                nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width), nn.ReLU()
            )
            self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.embed(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        return [optimizer], [schedule]


class NetWithoutOptimizer(Net):
    """Defines no configure_optimizers."""

    configure_optimizers = LightningModule.configure_optimizers  # type: ignore[assignment]


class BuiltInSetup(Net):
    """Builds its layers in `setup`."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "embed"):
            _borrow_layers(self)


class BuiltInConfigureModel(Net):
    """Builds its layers in `configure_model`, as Lightning recommends for large models."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        if not hasattr(self, "embed"):
            _borrow_layers(self)


class Data(LightningDataModule):
    """64 points in 8 dimensions, three classes."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 8, generator=generator)
        self.dataset = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def make_trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU; writes checkpoints only where a ModelCheckpoint is given."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "max_epochs": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def _borrow_layers(module: LightningModule) -> None:
    for name, child in Net().named_children():
        module.add_module(name, child)


OPTIONS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["embed", "body.2"],
    "modules_to_save": ["head"],
}


KEYS = [
    *(f"{path}.adapters.default.{name}" for path in ("embed", "body.2") for name in ("lora_A", "lora_B")),
    *(f"head.adapters.default.module.{name}" for name in ("weight", "bias")),
]  # fmt: skip


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def trained(folder: Path, module: Any = None, **options: Any) -> tuple[Trainer, Any]:
    trainer = make_trainer(folder, LoraCallback(**OPTIONS), **options)
    module = module or Net()
    trainer.fit(module, Data())
    return trainer, module


class WithHparams(Net):
    """Keeps its arguments; one of them is a class, which torch does not load."""

    def __init__(self, width: int = 16, scale: float = 1.0, act: Any = None) -> None:
        super().__init__(width)
        self.save_hyperparameters(ignore=[] if act else ["act"])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)
