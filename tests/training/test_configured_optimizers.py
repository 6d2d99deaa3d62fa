"""What `configure_optimizers` returns: optimizers that share parameters, and what is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, inject_adapter
from lora_lightning.errors import OptimizerError
from tests.helpers.lightning_modules import make_trainer

CONFIG = LoraConfig(r=2, target_modules=["encoder", "first", "second"])


class SharedEncoder(LightningModule):
    """Two tasks with an optimizer each, which both move the encoder (Lightning allows it)."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.encoder, self.first, self.second = (nn.Linear(6, 6) for _ in range(3))

    def losses(self, x: Tensor) -> Any:
        yield (self.first(self.encoder(x).tanh()) - 1).square().mean()
        yield (self.second(self.encoder(x).tanh()) + x).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for loss, optimizer in zip(self.losses(batch[0]), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        both = [[*self.encoder.parameters(), *h.parameters()] for h in (self.first, self.second)]
        return [torch.optim.SGD(both[0], lr=0.1, momentum=0.9), torch.optim.Adam(both[1], lr=0.01)]


class BuiltBefore(SharedEncoder):
    """Its optimizers are made before any adapter is there."""

    def __init__(self) -> None:
        super().__init__()
        self.made = SharedEncoder.configure_optimizers(self)

    def configure_optimizers(self) -> Any:
        return self.made


def data() -> DataLoader[Any]:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x), batch_size=4)


def adapters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if ".adapters." in name}


def plain_torch(epochs: int) -> dict[str, Tensor]:
    """The same without Lightning and without our optimizers."""
    module = SharedEncoder()
    seed_everything(7, verbose=False)
    inject_adapter(module, CONFIG)
    optimizers = SharedEncoder.configure_optimizers(module)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
    for _ in range(epochs):
        for (x,) in data():
            for loss, optimizer in zip(module.losses(x), optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return adapters(module)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("kind", [SharedEncoder, BuiltBefore])
def test_two_optimizers_share_parameters(tmp_path: Path, kind: Any) -> None:
    seed_everything(7, verbose=False)
    module = kind()
    save = ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1)  # two steps a batch
    trainer = make_trainer(tmp_path, LoraCallback(CONFIG), save, max_epochs=2)
    trainer.fit(module, data())
    assert [len(o.param_groups[0]["params"]) for o in trainer.optimizers] == [4, 4]
    found, truth = adapters(module), plain_torch(2)
    assert found.keys() == truth.keys()
    assert all(torch.allclose(value, truth[key], atol=1e-6) for key, value in found.items())

    seed_everything(8, verbose=False)
    again = kind()
    middle = tmp_path / "epoch=0-step=8.ckpt"
    assert middle.exists()
    make_trainer(tmp_path, LoraCallback(CONFIG), max_epochs=2).fit(again, data(), ckpt_path=middle)
    assert all(torch.equal(value, found[key]) for key, value in adapters(again).items())


def test_biases_of_another_optimizer_take_no_adapter(tmp_path: Path) -> None:
    """An adapter goes with the weight, also where the module's bias is in another optimizer."""

    class Split(BuiltBefore):
        def __init__(self) -> None:
            super().__init__()
            biases = [p for p in self.parameters() if p.ndim == 1]
            weights = [p for p in self.parameters() if p.ndim == 2]
            self.made = [torch.optim.Adam(biases, lr=0.01), torch.optim.SGD(weights, lr=0.1)]

    options: Any = {"r": 2, "target_modules": ["encoder", "second"], "bias": "lora_only"}
    trainer = make_trainer(tmp_path, LoraCallback(**options), max_steps=2)
    module = Split()
    trainer.fit(module, data())
    held = [{p.ndim for p in o.param_groups[0]["params"]} for o in trainer.optimizers]
    assert held == [{1}, {2}]


@pytest.mark.parametrize(
    "wrong",
    [torch.optim.SGD, lambda: torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), 1, "adamw",
     (torch.optim.Adam,), [None]],
    ids=["class", "factory", "number", "name", "class in a tuple", "None in a list"],
)  # fmt: skip
def test_only_none_means_no_optimizer(tmp_path: Path, wrong: Any) -> None:
    """What is none for Lightning is Lightning's to refuse, in the same words."""

    class Wrong(SharedEncoder):
        def configure_optimizers(self) -> Any:
            return wrong

    messages = []
    for callbacks in ([], [LoraCallback(CONFIG)]):
        module, trainer = Wrong(), make_trainer(tmp_path, *callbacks)
        with pytest.raises(MisconfigurationException) as error:
            trainer.fit(module, data())
        messages.append((type(error.value), str(error.value)))
        assert not trainer.global_step
    assert messages[0] == messages[1]


def test_an_empty_list_trains_nothing(tmp_path: Path) -> None:
    class Empty(SharedEncoder):
        def configure_optimizers(self) -> Any:
            return []

    with pytest.raises(OptimizerError, match=r"in no optimizer: encoder\.adapters"):
        make_trainer(tmp_path, LoraCallback(CONFIG)).fit(Empty(), data())


class Halved:
    """An optimizer around torch's, as several packages have one: no subclass of `Optimizer`."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.steps = inner, 0
        self.state, self.defaults = inner.state, inner.defaults

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    def zero_grad(self, *args: Any) -> None:
        self.inner.zero_grad()

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else p.grad / 2
        self.inner.step()
        self.steps += 1

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


def test_what_only_looks_like_an_optimizer(tmp_path: Path) -> None:
    class Wrapped(SharedEncoder):
        def configure_optimizers(self) -> Any:
            return [Halved(o) for o in super().configure_optimizers()]

    trainer = make_trainer(tmp_path, LoraCallback(CONFIG))
    trainer.fit(Wrapped(), data())
    assert [type(o) for o in trainer.optimizers] == [Halved, Halved]
    assert all(o.steps == 6 for o in trainer.optimizers)  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["keyword only", "anything", "static", "class"])
def test_setup_is_called_as_lightning_does(tmp_path: Path, form: str) -> None:
    seen: list[Any] = []

    class KeywordOnly(SharedEncoder):
        def setup(self, *, stage: str) -> None:
            seen.append(((), {"stage": stage}))

    class Anything(SharedEncoder):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            seen.append((args, kwargs))

    class Static(SharedEncoder):
        @staticmethod
        def setup(stage: str) -> None:
            seen.append(((), {"stage": stage}))

    class OfClass(SharedEncoder):
        @classmethod
        def setup(cls, stage: str) -> None:
            seen.append(((), {"stage": stage}))

    kinds = {"keyword only": KeywordOnly, "static": Static, "class": OfClass}
    kind = kinds.get(form, Anything)
    for callbacks in ([], [LoraCallback(CONFIG)]):
        make_trainer(tmp_path, *callbacks, fast_dev_run=True).fit(kind(), data())
    assert seen[0] == seen[1]
    assert seen[0][1] == {"stage": "fit"}
