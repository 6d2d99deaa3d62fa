"""Small data for the zoo: points with classes, two views of them, images, series."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

WIDTH, CLASSES = 8, 3


class Views(Dataset[Any]):
    """Two noisy views of each point, drawn anew whenever they are asked for."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        x = self.x[index]
        return x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x), self.y[index]


class Points(LightningDataModule):
    """32 points of three classes; training data are shuffled."""

    def dataset(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(32, WIDTH, generator=generator)
        return self.of(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())

    def of(self, x: Tensor, y: Tensor) -> Dataset[Any]:
        return TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


class TwoViews(Points):
    """Each point twice, for contrastive learning."""

    def of(self, x: Tensor, y: Tensor) -> Dataset[Any]:
        return Views(x, y)


class Images(Points):
    """Pictures of 6 x 6 pixels in one channel."""

    def of(self, x: Tensor, y: Tensor) -> Dataset[Any]:
        rows = torch.sigmoid(x[:, :6, None] + x[:, None, 2:8])
        return TensorDataset(rows[:, None], y)


class Series(Points):
    """Noisy sums of sines: 12 values, of which the last 3 are to be told."""

    def of(self, x: Tensor, y: Tensor) -> Dataset[Any]:
        time = torch.arange(12) / 3
        waves = torch.sin(time + x[:, :1]) + 0.5 * torch.sin(3 * time + x[:, 1:2])
        return TensorDataset(waves[:, :9, None], waves[:, 9:])
