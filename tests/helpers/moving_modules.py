"""LightningModules that change more of themselves than an optimizer does, each in its own way.

All have one Linear, `net`, for adapters; what moves beside it is in no adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback


class Moving(LightningModule):
    """A regression; what a subclass builds is the same in every process, as pretrained is."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(42)
            self.net = nn.Linear(8, 4)
            self.build()

    def build(self) -> None:
        """Make what moves."""

    def move(self, y: Tensor) -> None:
        """Move it, as a training step does."""

    def output(self, x: Tensor) -> Tensor:
        """What the module computes, of all its state."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = self.output(batch[0])
        self.move(y.detach())
        return (y - 1).square().mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("output", self.output(batch[0]).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class DataAssigned(Moving):
    """A frozen layer that follows the outputs: `p.data = ...`."""

    def build(self) -> None:
        self.slow = nn.Linear(8, 4).requires_grad_(False)

    def move(self, y: Tensor) -> None:
        self.slow.bias.data = 0.9 * self.slow.bias.data + 0.1 * y.mean(0)

    def output(self, x: Tensor) -> Tensor:
        return self.net(x) - self.slow(x).detach()


class DataCopied(DataAssigned):
    """The same by `.data.copy_`, of which torch counts no version."""

    def move(self, y: Tensor) -> None:
        self.slow.weight.data.copy_(self.slow.weight.data + y.mean())


class InPlace(DataAssigned):
    """The same in place."""

    @torch.no_grad()
    def move(self, y: Tensor) -> None:
        self.slow.weight.mul_(0.99)
        self.slow.bias.lerp_(y.mean(0), 0.1)


class ThroughNumpy(DataAssigned):
    """The same, past torch: by the array that shares its memory."""

    def move(self, y: Tensor) -> None:
        self.slow.weight.numpy()[1, 2] += float(y.mean())


class SignFlipped(DataAssigned):
    """All signs change, which a sum of absolute values would not show."""

    def move(self, y: Tensor) -> None:
        if self.global_step % 2 == 0:
            self.slow.weight.data.neg_()


class Swapped(DataAssigned):
    """Two rows change places, which a plain sum would not show."""

    def move(self, y: Tensor) -> None:
        if self.global_step == 1:
            self.slow.weight.data = self.slow.weight.data[[1, 0, 2, 3]]


class Masked(Moving):
    """PixelCNN: forward itself takes connections out of the frozen weight."""

    def build(self) -> None:
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0]), persistent=False)

    def output(self, x: Tensor) -> Tensor:
        self.conv.weight.data *= self.mask
        return self.net(x) + self.conv(x[:, None]).mean()


class MaxNorm(Moving):
    """EEGNet: forward keeps each row's norm below 1."""

    def build(self) -> None:
        self.wide = nn.Linear(8, 4)
        nn.init.constant_(self.wide.weight, 2.0)

    def output(self, x: Tensor) -> Tensor:
        self.wide.weight.data = torch.renorm(self.wide.weight.data, 2, 0, 1.0)
        return self.net(x) + self.wide(x)


class Centred(Moving):
    """DINO's centre: a buffer that is assigned anew."""

    def build(self) -> None:
        self.register_buffer("centre", torch.zeros(4))

    def move(self, y: Tensor) -> None:
        self.centre = 0.9 * self.centre + 0.1 * y.mean(0)

    def output(self, x: Tensor) -> Tensor:
        return self.net(x) - self.centre


class LateBuffer(Centred):
    """A buffer that is None until the first batch."""

    def build(self) -> None:
        self.register_buffer("centre", None)

    def move(self, y: Tensor) -> None:
        self.centre = y.mean(0) if self.centre is None else 0.9 * self.centre + 0.1 * y.mean(0)

    def output(self, x: Tensor) -> Tensor:
        return self.net(x) if self.centre is None else self.net(x) - self.centre


class Bank(Moving):
    """A memory bank that grows, and a counter in whole numbers."""

    def build(self) -> None:
        self.register_buffer("bank", torch.zeros(0, 4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def move(self, y: Tensor) -> None:
        self.bank = torch.cat([self.bank, y[:1]])
        self.seen += len(y)

    def output(self, x: Tensor) -> Tensor:
        return self.net(x) + self.bank.sum(0) / (1 + self.seen)


class Spectral(Moving):
    """A frozen layer under spectral norm, whose power iteration has buffers."""

    def build(self) -> None:
        self.critic = spectral_norm(nn.Linear(4, 1))

    def output(self, x: Tensor) -> Tensor:
        return self.net(x) + self.critic(self.net(x))


class Summed(Moving):
    """A metric whose state the module saves."""

    def build(self) -> None:
        self.total = torchmetrics.SumMetric()
        self.total.persistent(True)

    def move(self, y: Tensor) -> None:
        self.total.update(y.mean())

    def output(self, x: Tensor) -> Tensor:
        return self.net(x) + self.total.sum_value.detach()


class Collected(Moving):
    """A metric whose state is a list of tensors, inside a collection."""

    def build(self) -> None:
        self.metrics = torchmetrics.MetricCollection({"all": torchmetrics.CatMetric()})
        self.metrics.persistent(True)

    def move(self, y: Tensor) -> None:
        self.metrics["all"].update(y.mean())

    def output(self, x: Tensor) -> Tensor:
        values = self.metrics["all"].value
        return self.net(x) + sum(v.sum() for v in values) if values else self.net(x)


class Counter(nn.Module):
    """A count that only its own extra state holds."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


class OwnEntries(nn.Module):
    """A count that an overridden `_save_to_state_dict` adds."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "steps"] = torch.tensor(self.count)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "steps" in state_dict:
            self.count = int(state_dict.pop(prefix + "steps"))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Counted(Moving):
    """Extra state of a submodule."""

    counter: Callable[[], Any] = Counter

    def build(self) -> None:
        self.steps = type(self).counter()

    def move(self, y: Tensor) -> None:
        self.steps.count += 1

    def output(self, x: Tensor) -> Tensor:
        return self.net(x) * (1 + 0.1 * self.steps.count)


class CountedOtherwise(Counted):
    """An entry of a submodule's own."""

    counter = OwnEntries


class AddsEntry(Moving):
    """An entry that only the LightningModule's own two methods know."""

    def build(self) -> None:
        self.count = 0

    def move(self, y: Tensor) -> None:
        self.count += 1

    def output(self, x: Tensor) -> Tensor:
        return self.net(x) * (1 + 0.1 * self.count)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().state_dict(*args, **kwargs), "count": torch.tensor(self.count)}

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
        state_dict = dict(state_dict)
        self.count = int(state_dict.pop("count"))
        return super().load_state_dict(state_dict, strict)


MOVING: list[type[Moving]] = [
    DataAssigned, DataCopied, InPlace, ThroughNumpy, SignFlipped, Swapped, Masked, MaxNorm,
    Centred, LateBuffer, Bank, Spectral, Summed, Collected, Counted, CountedOtherwise, AddsEntry,
]  # fmt: skip


# -- runs of them -----------------------------------------------------------------------------------


def data() -> DataLoader:
    """Four batches an epoch."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), 4)


def trainer(folder: Path, lora: LoraCallback | None = None, **options: Any) -> Trainer:
    """A Trainer of two epochs that keeps a checkpoint of every step."""
    saver = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
    )
    lora = LoraCallback(r=2, target_modules=["net"]) if lora is None else lora
    settings: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "accelerator": "cpu", "callbacks": [lora, saver]}
    return Trainer(**{**settings, **options})


def everything(module: nn.Module) -> dict[str, Any]:
    """Every tensor of a module, and what it computes, by its own eyes."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    module.eval()
    with torch.no_grad():
        tensors["output"] = module.output(x)
    module.train()
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def saved(file: Path) -> dict[str, Any]:
    """What a checkpoint holds of the module."""
    return torch.load(file, weights_only=True)["state_dict"]
