"""Modules that set `requires_grad` over whole networks while they train."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, inject_adapter
from lora_lightning.errors import AdapterStateError
from tests.helpers.lightning_modules import OPTIONS, Data, Net, make_trainer
from tests.helpers.resumable_run import differences

CONFIG = LoraConfig(r=1, target_modules=["make", "0", "2"])


def data() -> DataLoader[Any]:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x), batch_size=4)


def only_adapters(module: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in module.named_parameters() if "adapters." in n]


class Gan(LightningModule):
    """The critic is frozen while the maker learns; `order` is that of several repositories."""

    automatic_optimization = False

    def __init__(self, order: str = "thaw after", raw: bool = False) -> None:
        super().__init__()
        self.order, self.raw = order, raw
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.make = nn.Linear(6, 6)
            self.critic = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))

    def switch(self, on: bool) -> None:
        for p in self.critic.parameters():
            p.requires_grad = on

    def of_maker(self, x: Tensor, backward: Any) -> None:
        made = self.make(x)
        self.switch(False)
        backward(-self.critic(made).mean())

    def of_critic(self, x: Tensor, backward: Any) -> None:
        self.switch(True)
        loss = self.critic(self.make(x).detach()).mean() - self.critic(x).mean()
        backward(loss + self.critic(x).square().mean())
        if self.order == "frozen at the end":
            self.switch(False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        make, critic = self.optimizers(use_pl_optimizer=not self.raw)
        self.steps(batch[0], make, critic, torch.Tensor.backward if self.raw else None)

    def steps(self, x: Tensor, make: Any, critic: Any, backward: Any = None) -> None:
        for step, optimizer in ((self.of_maker, make), (self.of_critic, critic)):
            optimizer.zero_grad()
            step(x, backward or self.manual_backward)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        make = torch.optim.Adam(self.make.parameters(), lr=0.02)
        return make, torch.optim.Adam(self.critic.parameters(), lr=0.01)


def plain_torch(epochs: int) -> dict[str, Tensor]:
    module = Gan()
    seed_everything(7, verbose=False)
    inject_adapter(module, CONFIG)
    parts = [only_adapters(part) for part in (module.make, module.critic)]
    module.switch = lambda on: [p.requires_grad_(on) for p in parts[1]]  # type: ignore[assignment]
    optimizers = [torch.optim.Adam(p, lr) for p, lr in zip(parts, (0.02, 0.01), strict=True)]
    for _ in range(epochs):
        for (x,) in data():
            module.steps(x, *optimizers, torch.Tensor.backward)
    return module.state_dict()


@pytest.mark.parametrize("raw", [False, True], ids=["optimizers", "raw optimizers"])
@pytest.mark.parametrize("order", ["thaw after", "frozen at the end"])
def test_gan(tmp_path: Path, order: str, raw: bool) -> None:
    seed_everything(7, verbose=False)
    module = Gan(order, raw)
    trainer = make_trainer(tmp_path, LoraCallback(CONFIG), max_epochs=3)
    with pytest.warns(UserWarning, match="requires_grad was set on 4 tensors of the base") as seen:
        trainer.fit(module, data())
    assert len([w for w in seen if "requires_grad was set" in str(w.message)]) == 1
    truth = plain_torch(3)
    assert all(torch.allclose(v, truth[k], atol=1e-6) for k, v in module.state_dict().items())
    assert all(torch.equal(v, truth[k]) for k, v in module.state_dict().items() if "adap" not in k)
    own = {id(p) for p in only_adapters(module)}
    rest = [p for p in module.parameters() if id(p) not in own]
    assert not any(p.requires_grad or p.grad is not None for p in rest)


@pytest.mark.filterwarnings("ignore:requires_grad was set on")
@pytest.mark.parametrize("where", ["on_train_start", "on_train_epoch_start", "on_after_backward"])
def test_the_base_is_unfrozen_from_an_epoch_on(tmp_path: Path, where: str) -> None:
    class Unfreezes(Net):
        def wake(self) -> None:
            if self.trainer.current_epoch == 1 or where == "on_train_start":
                self.body.requires_grad_(True)

    setattr(Unfreezes, where, Unfreezes.wake)
    states = []
    for kind in (Net, Unfreezes):
        seed_everything(1, verbose=False)
        module = kind()
        make_trainer(tmp_path, LoraCallback(**OPTIONS), max_epochs=3).fit(module, Data())
        states.append(module.state_dict())
    assert differences(*states) == []


def test_an_optimizer_that_is_given_the_base_is_stopped_before_its_step(tmp_path: Path) -> None:
    class Gradual(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.embed.requires_grad_(True)
                self.optimizers().add_param_group({"params": [self.embed.weight]})  # type: ignore

    module = Gradual()
    before = module.embed.weight.clone()
    trainer = make_trainer(tmp_path, LoraCallback(**OPTIONS))
    with pytest.raises(AdapterStateError, match=r"embed\.weight.* began to train.*modules_to_save"):
        trainer.fit(module, Data())
    assert trainer.global_step == 2
    assert torch.equal(module.embed.weight, before)


def test_an_adapter_that_is_frozen_for_good(tmp_path: Path) -> None:
    """From the second epoch on one adapter waits; a resumed run does not wake it."""

    class Freezes(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.embed.requires_grad_(False)

    def fit(folder: Path, epochs: int, ckpt_path: Path | None = None) -> Any:
        seed_everything(1 if ckpt_path is None else 2, verbose=False)
        module = Freezes()
        trainer = make_trainer(folder, LoraCallback(**OPTIONS), max_epochs=epochs)
        trainer.fit(module, Data(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / f"{epochs}.ckpt")
        return module.state_dict()

    first, second = fit(tmp_path, 1), fit(tmp_path, 2)
    name = "embed.adapters.default.lora_B"
    assert torch.equal(first[name], second[name])
    straight = fit(tmp_path, 4)
    resumed = fit(tmp_path / "again", 4, tmp_path / "2.ckpt")
    assert torch.equal(straight[name], first[name])
    assert differences(straight, resumed) == []


def test_an_adapter_that_does_not_train_stays_as_it_is(tmp_path: Path) -> None:
    class Wakes(Net):
        def on_train_batch_start(self, *args: Any) -> None:
            self.requires_grad_(True)

    kept = LoraCallback(r=2, target_modules=["body.2"], adapter_name="kept", trainable=False)
    module = Wakes()
    trainer = make_trainer(tmp_path, kept, LoraCallback(**OPTIONS), max_epochs=2)
    with pytest.warns(UserWarning, match="requires_grad was set on"):
        trainer.fit(module, Data())
    assert not module.body[2].adapters["kept"].lora_B.any()
    assert module.body[2].adapters["default"].lora_B.any()


def test_a_head_that_trains_in_full_may_be_told_to(tmp_path: Path) -> None:
    """Of what is kept aside of the base nothing is said: what was meant trains."""

    class Unfreezes(Net):
        def on_train_epoch_start(self) -> None:
            self.head.requires_grad_(True)

    module = Unfreezes()
    callback = LoraCallback(r=2, target_modules=["body.2"], modules_to_save=["head"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, callback, max_epochs=2).fit(module, Data())
    assert not [str(w.message) for w in caught if "requires_grad" in str(w.message)]
    assert not any(p.requires_grad for p in module.head.original_tensors.parameters())
    assert module.head.weight.requires_grad
