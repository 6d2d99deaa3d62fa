"""Members of the zoo that draw: adversaries, energies, masked pixels, codes, noise."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.zoo.data import WIDTH

Batch = Any
NOISE = 4


class Gan(LightningModule):
    """Two networks, two optimizers, by hand (Goodfellow et al. 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(NOISE, 16), nn.ReLU(), nn.Linear(16, WIDTH))
        self.critic = nn.Sequential(nn.Linear(WIDTH, 16), nn.LeakyReLU(0.2), nn.Linear(16, 4))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def score(self, x: Tensor, real: bool) -> Tensor:
        told = self.critic(x).mean(-1)
        return functional.binary_cross_entropy_with_logits(told, torch.full_like(told, float(real)))

    def step(self, loss: Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, (first, second) = batch[0], self.optimizers()
        noise = torch.randn(len(x), NOISE)
        self.toggle_optimizer(first)
        loss = self.score(self(noise), True)
        self.step(loss, first)
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        critic_loss = self.score(x, True) + self.score(self(noise).detach(), False)
        self.step(critic_loss, second)
        self.untoggle_optimizer(second)
        self.log_dict({"generator": loss, "critic": critic_loss})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        drawn = self(torch.randn(8, NOISE))
        self.log("val_critic", self.score(batch[0], True) + self.score(drawn, False))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(torch.randn(len(batch[0]), NOISE))

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-2, betas=(0.5, 0.999)),
            torch.optim.Adam(self.critic.parameters(), lr=1e-2, betas=(0.5, 0.999)),
        )


class GanByRequiresGrad(Gan):
    """Freezes the network that does not train by `requires_grad`, as pix2pix and CycleGAN do."""

    def set_requires_grad(self, network: nn.Module, required: bool) -> None:
        for parameter in network.parameters():
            parameter.requires_grad = required

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, (first, second) = batch[0], self.optimizers()
        noise = torch.randn(len(x), NOISE)
        self.set_requires_grad(self.critic, False)
        self.step(self.score(self(noise), True), first)
        self.set_requires_grad(self.critic, True)
        self.step(self.score(x, True) + self.score(self(noise).detach(), False), second)


class WassersteinGan(Gan):
    """Cuts the critic's weights off after each step (Arjovsky et al. 2017)."""

    def score(self, x: Tensor, real: bool) -> Tensor:
        told = self.critic(x).mean()
        return -told if real else told

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        for parameter in self.critic.parameters():
            parameter.data.clamp_(-0.2, 0.2)


class Energy(LightningModule):
    """Low energy for data, high for what Langevin steps draw from a buffer (Du and Mordatch 2019)."""

    replay: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, 4))
        self.register_buffer("replay", torch.rand(24, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x).mean(-1)

    def draw(self, start: Tensor) -> Tensor:
        x = start.clone()
        with torch.enable_grad():
            for _ in range(3):
                x = x.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(self(x).sum(), x)
                x = x - 0.1 * gradient + 0.01 * torch.randn_like(x)
        return x.detach()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = batch[0]
        places = torch.randint(len(self.replay), (len(x),))
        drawn = self.draw(self.replay[places])
        self.replay[places] = drawn
        real, false = self(x), self(drawn)
        loss = (real - false).mean() + 0.1 * (real.square() + false.square()).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("gap", (self(self.replay).mean() - self(batch[0]).mean()))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class MaskedConv(nn.Conv2d):
    """A convolution that sees only what was drawn before (van den Oord et al. 2016)."""

    mask: Tensor

    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 1, 1 + (kind == "B") :] = 0
        self.mask[:, :, 2:] = 0

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class PixelCnn(LightningModule):
    """The next pixel of those before it; weights are masked in place."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(MaskedConv("A", 1, 8), nn.ReLU(), MaskedConv("B", 8, 8))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(x))

    def loss(self, x: Tensor) -> Tensor:
        return functional.cross_entropy(self(x), (x[:, 0] * 4).long().clamp(max=3))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Codebook(nn.Module):
    """Nearest codes, which follow what is assigned to them (van den Oord et al. 2017)."""

    codes: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(6, NOISE))
        self.register_buffer("counts", torch.ones(6))

    def forward(self, z: Tensor) -> Tensor:
        nearest = torch.cdist(z, self.codes).argmin(-1)
        chosen = functional.one_hot(nearest, 6).to(z)
        if self.training:
            with torch.no_grad():
                self.counts.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
                self.codes.lerp_((chosen.T @ z) / self.counts[:, None], 0.1)
        return z + (self.codes[nearest] - z).detach()


class VqVae(LightningModule):
    """Codes in the middle, and a weight of its loss that rises with each step."""

    def __init__(self, rise: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, NOISE))
        self.codebook = Codebook()
        self.decoder = nn.Linear(NOISE, WIDTH)
        self.register_buffer("commitment", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.codebook(self.encoder(x)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = batch[0]
        z = self.encoder(x)
        coded = self.codebook(z + 0.05 * torch.randn_like(z))
        pull = (z - coded.detach()).square().mean()
        return (self.decoder(coded) - x).square().mean() + self.commitment * pull

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.commitment += self.hparams["rise"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_error", (self(batch[0]) - batch[0]).square().mean())

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)
