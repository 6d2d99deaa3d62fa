"""Members of the zoo that learn from labels: a teacher, an LSTM, metrics, norms of weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MaxMetric
from torchmetrics.classification import MulticlassAccuracy

from tests.helpers.zoo.data import CLASSES, WIDTH

Batch = Any


def mlp(outputs: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, outputs)
    )


class Classifier(LightningModule):
    """What the others share: a network, its loss, accuracy and predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", functional.cross_entropy(self(x), y))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        self.log("test_accuracy", (self(x).argmax(-1) == y).float().mean())

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Distillation(Classifier):
    """A student learns what a frozen teacher says (Hinton et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = mlp().eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, batch: Batch) -> Tensor:
        x, _ = batch
        with torch.no_grad():
            target = self.teacher(x).softmax(-1)
        return functional.cross_entropy(self(x), target)


class MeanTeacher(Classifier):
    """Labels, and agreement with an average of its own weights (Tarvainen and Valpola 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        told = self(x)
        with torch.no_grad():
            target = self.teacher(x + 0.1 * torch.randn_like(x))
        return functional.cross_entropy(told, y) + functional.mse_loss(told, target)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        pairs = zip(self.network.parameters(), self.teacher.parameters(), strict=False)
        for student, teacher in pairs:
            teacher.data = 0.9 * teacher.data + 0.1 * student.data

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.teacher(batch[0])


class Averaged(Classifier):
    """Evaluates torch's own average of the weights."""

    def __init__(self) -> None:
        super().__init__()
        average = get_ema_multi_avg_fn(0.9)
        self.average = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.average.requires_grad_(False)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.average.update_parameters(self.network)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.average(batch[0])


class Forecasting(ABC):
    """What a forecaster has to say; first among the bases."""

    @abstractmethod
    def horizon(self) -> int: ...


class Gate(ABC, nn.Linear):
    """A Linear below an abstract class."""


class Forecaster(Forecasting, LightningModule):
    """An LSTM, a gate and a head; its loss weighs the near future most."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.gate = Gate(hidden, hidden)
        self.head = nn.Linear(hidden, self.horizon())
        self.register_buffer("weights", 0.8 ** torch.arange(self.horizon()))

    def horizon(self) -> int:
        return 3

    def forward(self, x: Tensor) -> Tensor:
        last = self.lstm(x)[0][:, -1]
        return self.head(last * torch.sigmoid(self.gate(last)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        loss = ((self(x) - y).square() * self.weights).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_mae", (self(batch[0]) - batch[1]).abs().mean())

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_mae"}


class SpectralNorm(Classifier):
    """Each step of a power iteration moves buffers (Miyato et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            spectral_norm(nn.Linear(WIDTH, 16)), nn.ReLU(), spectral_norm(nn.Linear(16, CLASSES))
        )


class WeightNorm(Classifier):
    """Direction and length of a weight apart (Salimans and Kingma 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            weight_norm(nn.Linear(WIDTH, 16)), nn.ReLU(), nn.Linear(16, CLASSES)
        )


class MaxNorm(Classifier):
    """Renormalises a weight before it is used, as EEGNet does (Lawhern et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.network[0]
        first.weight.data = torch.renorm(first.weight.data, p=2, dim=0, maxnorm=0.5)
        return self.network(x)


class Counted(nn.Module):
    """Counts what it has seen, in its extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return x * (1 + 1e-3 * self.seen)

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


class Metrics(Classifier):
    """Metrics that go on over epochs, and a module with an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(Counted(), *mlp())
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.so_far = MulticlassAccuracy(CLASSES)
        self.so_far.persistent(True)
        self.highest = MaxMetric()
        self.highest.persistent(True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        told = self(x)
        self.accuracy(told, y)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.so_far.update(told, y)
        self.highest.update(self.so_far.compute())
        return functional.cross_entropy(told, y) / (1 + self.so_far.compute())

    def on_validation_epoch_end(self) -> None:
        self.log("highest", self.highest.compute())


class Borrowed(Classifier):
    """Leaves a part out of its state dict and keeps one of its own, as Lightning's guide shows."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.hardness = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.features(x))

    def loss(self, batch: Batch) -> Tensor:
        self.hardness *= 0.9
        return super().loss(batch) * self.hardness

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        whole = super().state_dict(*args, **kwargs)
        return {key: value for key, value in whole.items() if "features" not in key}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hardness"] = self.hardness
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("network.0")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.hardness = checkpoint["hardness"]
