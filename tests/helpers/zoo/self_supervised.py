"""Members of the zoo that learn without labels: teachers, queues, centres, prototypes, banks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.zoo.data import WIDTH

Batch = Any
FEATURES = 6


def encoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, FEATURES)
    )


def normal(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


class Embedding(LightningModule):
    """What the others share: features of two views are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, x: Tensor) -> Tensor:
        return normal(self.encoder(x))

    def loss(self, one: Tensor, two: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch[0], batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("agreement", (self(batch[0]) * self(batch[1])).sum(-1).mean())

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Byol(Embedding):
    """Tells what a slow copy of itself says of the other view (Grill et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = nn.Linear(FEATURES, FEATURES)
        self.target = copy.deepcopy(self.encoder)
        for parameter in self.target.parameters():
            parameter.requires_grad = False

    def loss(self, one: Tensor, two: Tensor) -> Tensor:
        with torch.no_grad():
            first, second = normal(self.target(one)), normal(self.target(two))
        told_first, told_second = (normal(self.predictor(self.encoder(v))) for v in (two, one))
        return 4 - 2 * ((told_first * first) + (told_second * second)).sum(-1).mean()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        pairs = zip(self.encoder.parameters(), self.target.parameters(), strict=False)
        for online, target in pairs:
            target.data = 0.95 * target.data + 0.05 * online.data

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return torch.cat([self(batch[0]), self.target(batch[0])], dim=-1)


class Moco(Embedding):
    """A queue of keys from a slow encoder (He et al. 2020)."""

    queue: Tensor
    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.keys = encoder()
        self.keys.load_state_dict(self.encoder.state_dict())
        self.keys.requires_grad_(False)
        self.register_buffer("queue", normal(torch.randn(20, FEATURES)))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _follow(self) -> None:
        own = dict(self.encoder.named_parameters())
        for name, key in self.keys.named_parameters():
            key.data.mul_(0.9).add_(own[name].data, alpha=0.1)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        start = int(self.position)
        self.queue[torch.arange(start, start + len(keys)) % len(self.queue)] = keys
        self.position[0] = (start + len(keys)) % len(self.queue)

    def loss(self, one: Tensor, two: Tensor) -> Tensor:
        asked = self(one)
        self._follow()
        with torch.no_grad():
            keys = normal(self.keys(two))
        near = (asked * keys).sum(-1, keepdim=True)
        logits = torch.cat([near, asked @ self.queue.clone().T], dim=1) / 0.2
        self._enqueue(keys)
        return functional.cross_entropy(logits, torch.zeros(len(one), dtype=torch.long))


class Dino(Embedding):
    """Tells what a centred, sharpened slow copy says of the other view (Caron et al. 2021)."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, FEATURES))

    def loss(self, one: Tensor, two: Tensor) -> Tensor:
        with torch.no_grad():
            said = self.teacher(one)
            target = ((said - self.center) / 0.1).softmax(-1)
        loss = functional.cross_entropy(self.encoder(two) / 0.5, target)
        self.center = 0.9 * self.center + 0.1 * said.mean(0, keepdim=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        with torch.no_grad():
            student = dict(self.encoder.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.lerp_(student[name], 0.1)


class Prototypes(nn.Linear):
    """Directions that are kept at length one."""

    def __init__(self) -> None:
        super().__init__(FEATURES, 5, bias=False)

    @torch.no_grad()
    def normalize(self) -> None:
        self.weight.copy_(normal(self.weight))


class Swav(Embedding):
    """Assigns views to prototypes that train whole (Caron et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = Prototypes()

    def loss(self, one: Tensor, two: Tensor) -> Tensor:
        self.prototypes.normalize()
        first, second = (self.prototypes(self(view)) for view in (one, two))
        return functional.cross_entropy(first / 0.1, (second.detach() / 0.05).softmax(-1))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0]) @ self.prototypes.weight.T


class MemoryBank(Embedding):
    """Near to what was kept of the same class (Wu et al. 2018); the bank is a new tensor each time."""

    bank: Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", normal(torch.randn(12, FEATURES)))
        self.register_buffer("labels", torch.arange(12) % 3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        told, y = self(batch[0]), batch[2]
        alike = (y[:, None] == self.labels[None]).float()
        scores = (told @ self.bank.T / 0.2).log_softmax(-1)
        self.bank = torch.cat([self.bank[len(y) :], told.detach()])
        self.labels = torch.cat([self.labels[len(y) :], y])
        return -(scores * alike).sum(-1).mean() / 4
