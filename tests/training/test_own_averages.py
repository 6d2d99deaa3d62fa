"""Averages of a module's own that note its parameters before there are adapters: refused, or said."""

from __future__ import annotations

import copy
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lora_lightning import LoraCallback
from lora_lightning.errors import TargetError
from tests.helpers.moving_modules import Moving, data, trainer


class Named(Moving):
    """As ema_pytorch: a frozen copy, of whose parameters those are moved whose names are noted."""

    def build(self) -> None:
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.teacher = copy.deepcopy(self.body).requires_grad_(False)
        self.names = {name for name, _ in self.teacher.named_parameters()}

    def output(self, x: Tensor) -> Tensor:
        return self.body(self.net(x)) - self.teacher(self.net(x)).detach()

    @torch.no_grad()
    def move(self, y: Tensor) -> None:
        student = dict(self.body.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            if name in self.names:
                parameter.lerp_(student[name], 0.1)


class EachTime(Named):
    """The way out that the error names: names as they are then."""

    def build(self) -> None:
        super().build()
        del self.names

    @torch.no_grad()
    def move(self, y: Tensor) -> None:
        student = dict(self.body.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            parameter.lerp_(student[name], 0.1)


class InBuffers(Moving):
    """Averages in buffers of the module itself, by names."""

    def build(self) -> None:
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.names = {}
        for name, parameter in self.body.named_parameters():
            self.names[name] = "ema_" + name.replace(".", "_")
            self.register_buffer(self.names[name], parameter.detach().clone())

    def output(self, x: Tensor) -> Tensor:
        return self.body(self.net(x))

    @torch.no_grad()
    def move(self, y: Tensor) -> None:
        for name, parameter in self.body.named_parameters():
            if name in self.names:
                getattr(self, self.names[name]).lerp_(parameter, 0.1)


class LitEma(nn.Module):
    """As latent diffusion has it: what is not noted must not train, and the other way round."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {n: n.replace(".", "") for n, p in model.named_parameters() if p.requires_grad}
        for name, buffer in self.names.items():
            self.register_buffer(buffer, model.get_parameter(name).detach().clone())

    def update(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.get_buffer(self.names[name]).lerp_(parameter.detach(), 0.1)
            else:
                assert name not in self.names


class Asserts(InBuffers):
    def build(self) -> None:
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.ema = LitEma(self.body)

    def move(self, y: Tensor) -> None:
        self.ema.update(self.body)


class Shadow:
    """As torch_ema: no module, with copies of the parameters in order and references to them."""

    def __init__(self, parameters: Any, keeps: str) -> None:
        parameters = list(parameters)
        if keeps != "copies":
            self.refs = [weakref.ref(p) if keeps == "weak" else p for p in parameters]
        if keeps == "copies":
            self.shadow = [p.detach().clone() for p in parameters]


class Helped(InBuffers):
    keeps = "weak"

    def build(self) -> None:
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.ema = Shadow(self.body.parameters(), self.keeps)

    def move(self, y: Tensor) -> None:
        pass


class HelpedStrongly(Helped):
    keeps = "strong"


class HelpedByCopies(Helped):
    keeps = "copies"


class Ordinary(InBuffers):
    """A list for the optimizer, names of a few, a snapshot of another network, metrics."""

    def build(self) -> None:
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.all = list(self.body.parameters())
        self.no_decay = ["0.bias", "2.bias"]
        self.average = AveragedModel(self.body)
        self.classes = ["a", "b", "c", "d"]
        self.history: list[Tensor] = [torch.zeros(2), torch.ones(2)]

    def move(self, y: Tensor) -> None:
        self.average.update_parameters(self.body)


def fit(make: type[LightningModule], folder: Path, **options: Any) -> list[str]:
    """What is said of notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, LoraCallback(r=2, **options), max_epochs=1).fit(make(), data())
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "from before adapters came" in text]


def test_a_teacher_that_goes_by_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"'names' notes the parameters of 'body' .*'teacher'"):
        fit(Named, tmp_path)
    assert fit(Named, tmp_path, target_modules=["net"]) == []  # neither has adapters
    assert fit(EachTime, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "attribute", "what"),
    [
        (InBuffers, "names", "names"),
        (Helped, "ema.refs", "tensors"),
        (HelpedStrongly, "ema.refs", "tensors"),
        (HelpedByCopies, "ema.shadow", "copies"),
    ],
)
def test_what_passes_over_adapters_is_said(
    make: type[LightningModule], attribute: str, what: str, tmp_path: Path
) -> None:
    (said,) = fit(make, tmp_path)
    assert said.startswith(f"'{attribute}' holds the {what} of all parameters of 'body' from bef")
    assert fit(make, tmp_path, target_modules=["net"]) == []


def test_what_fails_is_explained(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        fit(Asserts, tmp_path)
    assert "'ema.names' holds the names of all parameters of 'body'" in caught.value.__notes__[0]


def test_other_lists_are_nobodys_business(tmp_path: Path) -> None:
    assert fit(Ordinary, tmp_path) == []
