"""Traps of Lightning and torch for adapters, each with the statement of the trap.

In the order of events: setup, checkpoints, optimizers, command line, several calls, compilation.
What cannot occur has a test that shows why not.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.model_summary import summarize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback, adapter_names, load_from_checkpoint
from lora_lightning.errors import AdapterStateError
from tests.helpers.lightning_modules import (
    KEYS,
    OPTIONS,
    BuiltInConfigureModel,
    BuiltInSetup,
    Data,
    Net,
    NetWithoutOptimizer,
    WithHparams,
    make_trainer,
    saved,
    trained,
)

# -- 1 order of events -----------------------------------------------------------------------------------


def test_callback_from_configure_callbacks(tmp_path: Path) -> None:
    """A module may bring the callback itself, after the Trainer was made."""

    class Brings(NetWithoutOptimizer):
        def configure_callbacks(self) -> Any:
            return [LoraCallback(**OPTIONS)]

    module, trainer = Brings(), make_trainer(tmp_path)
    trainer.fit(module, Data())
    assert adapter_names(module) == ["default"]
    assert type(trainer.optimizers[0]) is torch.optim.AdamW


def test_checkpoint_callbacks_come_last(tmp_path: Path) -> None:
    """Lightning puts them behind LoraCallback, whatever the list says: they see the final state."""
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path), LoraCallback(**OPTIONS))
    kinds = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds == ["LoraCallback", "ModelCheckpoint"]


@pytest.mark.parametrize("kind", [Net, BuiltInSetup, BuiltInConfigureModel])
def test_exception_without_teardown(tmp_path: Path, kind: type) -> None:
    """After an exception Lightning calls no Callback.teardown: the next fit finds what is left."""

    class Fails(kind):  # type: ignore[misc,valid-type]
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.fails and batch_idx == 2:
                raise ValueError("the user's own")
            return super().training_step(batch, batch_idx)

    module, trainer = Fails(), make_trainer(tmp_path, LoraCallback(**OPTIONS))
    with pytest.raises(ValueError, match="the user's own"):
        trainer.fit(module, Data())
    module.fails = False
    trainer.fit(module, Data())
    make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(module, Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert sorted(saved(tmp_path / "a.ckpt")["state_dict"]) == sorted(KEYS)


def test_configure_model_is_called_again_and_again(tmp_path: Path) -> None:
    """Once for every entry point: what has grown stays, also where the user's body runs twice."""

    class Counts(BuiltInConfigureModel):
        calls = 0

        def configure_model(self) -> None:
            self.calls += 1
            super().configure_model()

    trainer, module = trained(tmp_path, Counts())
    before = copy.deepcopy(module.state_dict())
    trainer.validate(module, Data(), verbose=False)
    trainer.test(module, Data(), verbose=False)
    module.configure_model()
    assert module.calls == 4
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_a_hook_that_is_not_overridden_stays_so(tmp_path: Path) -> None:
    """Lightning calls configure_model and others only where they are overridden."""
    _, module = trained(tmp_path)
    assert not is_overridden("configure_model", module)


# -- 5 several calls ---------------------------------------------------------------------------------------


def test_same_trainer_with_a_second_module(tmp_path: Path) -> None:
    """What is remembered of the first must not be taken for the second."""
    trainer, first = trained(tmp_path)
    before = copy.deepcopy(first.state_dict())
    second = Net()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(second, Data())
    assert all(second.state_dict()[key].any() for key in KEYS)
    assert all(torch.equal(before[key], value) for key, value in first.state_dict().items())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    state = saved(tmp_path / "b.ckpt")["state_dict"]
    assert sorted(state) == sorted(KEYS)
    assert all(torch.equal(state[key], second.state_dict()[key]) for key in KEYS)


def test_a_trainer_without_the_callback(tmp_path: Path) -> None:
    """It knows of no adapters: the base is missing in the file, and Lightning names the callback."""
    saver = ModelCheckpoint(tmp_path, filename="a")
    make_trainer(tmp_path, LoraCallback(**OPTIONS), saver).fit(Net(), Data())
    with pytest.raises(RuntimeError, match="Missing key"):
        make_trainer(tmp_path).validate(Net(), Data(), ckpt_path=tmp_path / "a.ckpt")
    lax = Net()
    lax.strict_loading = False  # then nothing is refused
    with pytest.warns(UserWarning, match=r"add the following callbacks: .*LoraCallback.*default"):
        make_trainer(tmp_path).validate(lax, Data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_pytorch_lightning_package(tmp_path: Path) -> None:
    """Its classes are not those of `lightning`: isinstance and is_overridden fail across the two."""
    pl = pytest.importorskip("pytorch_lightning")

    class Theirs(pl.LightningModule):  # type: ignore[name-defined,misc]
        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                torch.manual_seed(0)
                self.net = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def fit(folder: Path, epochs: int, ckpt_path: Any = None) -> Any:
        pl.seed_everything(5 if ckpt_path is None else 6, verbose=False)
        module = Theirs()
        saver = pl.callbacks.ModelCheckpoint(folder, save_last=True)
        trainer = pl.Trainer(
            max_epochs=epochs, default_root_dir=folder, callbacks=[LoraCallback(r=2), saver],
            logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        loader = DataLoader(Data().dataset, 16, shuffle=True)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return module

    straight = fit(tmp_path / "straight", 4)
    fit(tmp_path / "broken", 2)
    resumed = fit(tmp_path / "broken", 4, "last")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in straight.state_dict().items())
    state = saved(tmp_path / "broken/last.ckpt")["state_dict"]
    assert sorted(state) == ["net.adapters.default.lora_A", "net.adapters.default.lora_B"]
    loaded, x = load_from_checkpoint(Theirs, tmp_path / "broken/last.ckpt"), torch.randn(4, 8)
    assert torch.equal(loaded(x), straight(x))


# -- 6 gradient checkpointing ------------------------------------------------------------------------------


class Checkpointed(Net):
    """Recomputes a part of its forward in backward."""

    reentrant, whole = True, True

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)
        hidden = checkpoint(self.inside, x, use_reentrant=self.reentrant)
        return self.head(hidden)

    def inside(self, x: Tensor) -> Tensor:
        return self.body(self.norm(self.embed(x)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_gradient_checkpointing(tmp_path: Path) -> None:
    """With frozen inputs it gives no gradient: none at all is an error, some a warning."""
    with pytest.raises(AdapterStateError, match=r"does not depend on any .*use_reentrant=False"):
        trained(tmp_path, Checkpointed())
    module = Checkpointed()
    module.whole = False
    with pytest.warns(UserWarning, match=r"4 of 6 trainable tensors had no gradient.*reentrant"):
        trained(tmp_path, module)
    seed_everything(1, verbose=False)
    module = Checkpointed()
    module.reentrant = False
    trained(tmp_path, module)
    seed_everything(1, verbose=False)
    _, plain = trained(tmp_path)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in plain.state_dict().items())


# -- what users switch on ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
        ({"limit_train_batches": 2, "limit_val_batches": 1}, 2),
        ({"overfit_batches": 1}, 1),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 8),
        ({"max_steps": 3, "max_epochs": -1}, 3),
        ({"val_check_interval": 0.5, "num_sanity_val_steps": -1}, 4),
        ({"profiler": "simple", "inference_mode": False}, 4),
        ({"detect_anomaly": True}, 4),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_of_the_trainer(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    trainer, module = trained(tmp_path, **options)
    assert trainer.global_step == steps
    assert all(module.state_dict()[key].any() for key in KEYS)
    base = Net().state_dict()
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in base.items())


@pytest.mark.filterwarnings("ignore:You are trying to .self.log.* but .Trainer.barebones")
def test_barebones(tmp_path: Path) -> None:
    module = Net()
    trainer = Trainer(
        barebones=True, accelerator="cpu", max_epochs=1, callbacks=[LoraCallback(**OPTIONS)]
    )
    trainer.fit(module, Data())
    assert all(module.state_dict()[key].any() for key in KEYS)


def test_options_are_logged(tmp_path: Path) -> None:
    """Lightning logs the hyperparameters of modules and data, not those of callbacks."""
    import yaml

    def hparams(**options: Any) -> dict[str, Any]:
        logger = CSVLogger(tmp_path)
        trained(tmp_path, WithHparams(), logger=logger, **options)
        logger.save()
        file = Path(logger.log_dir) / "hparams.yaml"
        return yaml.safe_load(file.read_text()) if file.exists() else {}

    logged = hparams()
    assert (logged["width"], logged["scale"]) == (16, 1.0)
    assert logged["lora"]["default"]["r"] == 2
    assert logged["lora"]["default"]["type"] == "LORA"
    assert logged["lora"]["default"]["target_modules"] == ["embed", "body.2"]
    assert "lora" not in hparams(enable_autolog_hparams=False)


class TensorBoardLogger(CSVLogger):
    """With the one rule of the real one, which needs another package: metrics of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.hparams: dict[str, Any] = {}
        self.metrics: list[Any] = []

    def log_hyperparams(self, params: Any, metrics: Any = None, step: Any = None) -> None:
        super().log_hyperparams(params)
        self.hparams.update(params)
        metrics = {"hp_metric": -1} if metrics is None else metrics
        self.metrics += list(metrics)


@pytest.mark.parametrize(("kind", "metrics"), [(Net, set()), (WithHparams, {"hp_metric"})])
def test_options_bring_no_metric(tmp_path: Path, kind: Any, metrics: set[str]) -> None:
    """As without the callback: only a run with hyperparameters gets TensorBoard's hp_metric."""
    logger, alone = TensorBoardLogger(tmp_path / "a"), TensorBoardLogger(tmp_path / "b")
    trained(tmp_path, kind(), logger=logger)
    make_trainer(tmp_path, logger=alone).fit(kind(), Data())
    assert set(logger.metrics) == set(alone.metrics) == metrics
    assert logger.hparams["lora"]["default"]["r"] == 2


def test_model_summary(tmp_path: Path) -> None:
    _, module = trained(tmp_path)
    table = str(summarize(module, max_depth=-1))
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    kinds = {row[1]: row[2] for row in rows if len(row) > 2}
    assert kinds["embed"] == "AdaptedLinear"
    assert kinds["embed.adapters.default"] == "LoraAdapter"
    assert kinds["head.adapters.default"] == "ModulesToSaveCopy"
    assert re.search(r"^163 +Trainable params", table, re.MULTILINE)
    assert re.search(r"^499 +Non-trainable params", table, re.MULTILINE)
