"""Whatever a run makes use of, it goes on exactly, from the middle and from the end of an epoch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, SequentialLR
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

import lora_lightning.training.resume.loop_state
import lora_lightning.training.resume.run_state
from lora_lightning import AdaLoraConfig, LoraCallback
from lora_lightning.training.resume.resumable_loader import ResumableLoader
from lora_lightning.utilities.rng import random_state, set_random_state
from tests.helpers.lightning_modules import (
    BuiltInConfigureModel,
    Data,
    Net,
    NetWithoutOptimizer,
    make_trainer,
)
from tests.helpers.resumable_run import SPOTS, ResumableRun, differences


class WarmUp(Net):
    """A learning rate that changes with every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        parts = [LinearLR(optimizer, 0.1, total_iters=5), CosineAnnealingLR(optimizer, 7)]
        schedule = SequentialLR(optimizer, parts, [5])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plateau(Net):
    """A learning rate that falls whenever a metric did not improve, and here it never does."""

    interval, monitor = "epoch", "val_loss"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        schedule = ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        how = {"scheduler": schedule, "interval": self.interval, "monitor": self.monitor}
        return {"optimizer": optimizer, "lr_scheduler": how}


class PlateauByStep(Plateau):
    interval, monitor = "step", "loss"


class Manual(Net):
    """Its own accumulation of three batches, over the ends of epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 3)
        if (self.trainer.fit_loop.total_batch_idx + 1) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class Estimates(Net):
    """A schedule over the whole run, of the length that Lightning finds."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = {"scheduler": CosineAnnealingLR(optimizer, steps), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class DrawsInHooks(Net):
    """Draws random numbers wherever a hook lets it."""

    def on_train_start(self) -> None:
        torch.rand(3)

    def on_train_epoch_start(self) -> None:
        torch.rand(2)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.rand(1)

    def on_validation_epoch_end(self) -> None:
        torch.rand(1)


def ema() -> list[Any]:
    return [WeightAveraging(avg_fn=get_ema_avg_fn(0.9))]


def stopping() -> list[Any]:
    return [EarlyStopping("val_loss", patience=4, min_delta=10.0)]  # nothing counts as better


def two_adapters() -> list[Any]:
    first = LoraCallback(r=2, lora_dropout=0.3, target_modules=["embed"], adapter_name="one")
    return [first, LoraCallback(r=3, target_modules=["body.2"], adapter_name="two")]


def adalora() -> list[Any]:
    schedule = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 2}
    return [LoraCallback(AdaLoraConfig(**schedule, target_modules=["embed", "body.2"]))]


def accumulating() -> list[Any]:
    return [GradientAccumulationScheduler({1: 3, 2: 2})]


class KeepsUpInValidation(Net):
    """A count that validation moves, as it does the queue of MoCo."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += len(batch[0])
        return super().validation_step(batch, batch_idx)


def options(**given: Any) -> Any:
    return lambda: dict(given)


RUNS = {
    "plain": ResumableRun(),
    "default optimizer": ResumableRun(module=NetWithoutOptimizer),
    "configure_model": ResumableRun(module=BuiltInConfigureModel),
    "accumulate": ResumableRun(options=options(accumulate_grad_batches=3)),
    "accumulate by epoch": ResumableRun(
        callbacks=accumulating, spots=("batch2", "batch6", "end8", "batch9")
    ),
    "clip": ResumableRun(options=options(gradient_clip_val=0.1)),
    "warm-up by step": ResumableRun(module=WarmUp, options=options(accumulate_grad_batches=3)),
    "estimated length": ResumableRun(module=Estimates),
    "estimated length, accumulate": ResumableRun(
        module=Estimates, options=options(accumulate_grad_batches=3)
    ),
    "plateau": ResumableRun(module=Plateau),
    "plateau, two validations": ResumableRun(
        module=Plateau, options=options(val_check_interval=0.5)
    ),
    "plateau by step": ResumableRun(module=PlateauByStep),
    "ema": ResumableRun(callbacks=ema),
    "early stopping": ResumableRun(callbacks=stopping, options=options(val_check_interval=0.5)),
    "bf16-mixed": ResumableRun(options=options(precision="bf16-mixed")),
    "bf16-true": ResumableRun(options=options(precision="bf16-true")),
    "manual optimization": ResumableRun(module=Manual),
    "two adapters": ResumableRun(lora=two_adapters),
    "adalora": ResumableRun(lora=adalora),
    "hooks that draw": ResumableRun(module=DrawsInHooks),
    "kept up in validation": ResumableRun(
        module=KeepsUpInValidation, options=options(num_sanity_val_steps=2)
    ),
    "max_steps": ResumableRun(options=options(max_steps=11, max_epochs=-1)),
    "plateau, max_steps": ResumableRun(
        module=Plateau, options=options(max_steps=11, max_epochs=-1)
    ),
    "no validation": ResumableRun(
        options=options(limit_val_batches=0), spots=("batch2", "batch4", "end8", "batch9")
    ),
    "no validation, max_steps, limited": ResumableRun(
        options=options(limit_val_batches=0, limit_train_batches=3, max_steps=8, max_epochs=-1),
        spots=("batch2", "batch3", "end6", "batch7"),
    ),
    "validation in the epoch": ResumableRun(
        options=options(val_check_interval=0.5), spots=("batch2", "validated2", "batch3", "end4")
    ),
    "validation by steps": ResumableRun(
        options=options(val_check_interval=3, check_val_every_n_epoch=None),
        spots=("batch3", "validated3", "batch4", "end4", "validated9"),
    ),
}


FAST = (
    "plain",
    "accumulate",
    "two adapters",
    "adalora",
    "validation in the epoch",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in RUNS]
)
def test_resume_is_exact(tmp_path: Path, name: str) -> None:
    RUNS[name].check(tmp_path)


def test_negative_control_accumulation_that_does_not_follow_differs(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        lora_lightning.training.resume.loop_state, "GradientAccumulationScheduler", EarlyStopping
    )
    with pytest.raises(AssertionError):
        RUNS["accumulate by epoch"].check(tmp_path)


@pytest.mark.parametrize(
    "without", ["random state", "position", "gradients", "the rest of the batch", "metrics"]
)
def test_negative_control_without_differs(tmp_path: Path, monkeypatch: Any, without: str) -> None:
    state = lora_lightning.training.resume.run_state
    run, spot = ResumableRun(), "batch9"
    if without == "random state":
        monkeypatch.setattr(state, "set_random_state", lambda _: None)
    elif without == "position":
        monkeypatch.setattr(ResumableLoader, "load_state_dict", lambda self, position: None)
    elif without == "gradients":
        run, spot = RUNS["accumulate"], "batch2"
        monkeypatch.setattr(state, "_gradients", lambda module: {})
    elif without == "the rest of the batch":
        spot = "batch4"
        monkeypatch.setattr(state, "complete_loops", lambda loops, trainer: None)
    else:
        run, spot = RUNS["plateau by step"], "batch2"
        monkeypatch.setattr(state, "continue_loops", lambda trainer, metrics: None)
    straight = run.fit(tmp_path)
    resumed = run.fit(tmp_path / "again", tmp_path / f"{spot}.ckpt")
    assert any("lora_B" in path for path in differences(straight, resumed))


def test_files_of_asynchronous_saving(tmp_path: Path) -> None:
    run = ResumableRun(options=lambda: {"plugins": [AsyncCheckpointIO()]})
    straight = run.fit(tmp_path)
    for spot in SPOTS:
        assert (
            differences(straight, ResumableRun().fit(tmp_path / spot, tmp_path / f"{spot}.ckpt"))
            == []
        )


def test_model_checkpoint_by_time_and_by_step(tmp_path: Path) -> None:
    """ModelCheckpoint falls between two optimizer steps when it saves by time."""
    for index, when in enumerate(
        [{"train_time_interval": timedelta(0)}, {"every_n_train_steps": 1}]
    ):
        folder = tmp_path / str(index)
        saver = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **when)
        accumulate = options(accumulate_grad_batches=2)
        run = ResumableRun(callbacks=lambda saver=saver: [saver], options=accumulate, spots=())
        straight = run.fit(folder)
        files = sorted(folder.glob("*.ckpt"))
        assert len(files) == 6  # optimizer steps
        for path in files[1:4]:
            again = ResumableRun(options=accumulate, spots=())
            resumed = again.fit(folder / path.stem, path)
            assert differences({**straight, "callbacks": resumed["callbacks"]}, resumed) == []


@pytest.mark.parametrize(
    "why",
    [
        {"patience": 1, "min_delta": 10.0},
        {"patience": 0, "min_delta": 10.0},
        {"stopping_threshold": 10.0},
        {"divergence_threshold": -10.0},
    ],
    ids=str,
)
def test_a_run_that_early_stopping_ended_stays_ended(tmp_path: Path, why: dict[str, Any]) -> None:
    stop = {"monitor": "val_loss", **why}
    saver = lambda: ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True)  # noqa: E731
    run = ResumableRun(callbacks=lambda: [EarlyStopping(**stop), saver()], spots=())
    straight = run.fit(tmp_path)
    steps, epochs = straight["progress"]
    assert epochs < 3
    last = f"step={steps}.ckpt"
    resumed = run.fit(tmp_path / "same", tmp_path / last)
    assert differences(straight["weights"], resumed["weights"]) == []
    assert resumed["losses"] == {}
    without = ResumableRun(spots=()).fit(tmp_path / "more", tmp_path / last)
    assert without["progress"] == [12, 3]


def test_early_stopping_without_patience_goes_on_while_there_is_progress(tmp_path: Path) -> None:
    """Its count of bad epochs, 0, is not less than its patience, 0, from the start."""
    stop = {"monitor": "val_loss", "patience": 0, "min_delta": -10.0}  # all counts as better
    run = ResumableRun(callbacks=lambda: [EarlyStopping(**stop)], spots=("batch2", "end8"))
    run.check(tmp_path)


def test_what_a_checkpoint_says_is_for_one_run_only(tmp_path: Path) -> None:
    """A finished run never trains, and leaves nothing behind for the module's next one."""
    saver = ResumableRun(spots=("end12",))
    saver.fit(tmp_path)
    module = Net()
    (callback,) = saver.lora()
    make_trainer(tmp_path, callback, max_epochs=3).fit(
        module, Data(), ckpt_path=tmp_path / "end12.ckpt"
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = []
    module.on_train_batch_start = lambda batch, idx: drawn.append(torch.get_rng_state())  # type: ignore
    make_trainer(tmp_path, callback, max_steps=1, max_epochs=-1).fit(
        module, DataLoader(Data().dataset, 16)
    )
    torch.set_rng_state(before)
    next(iter(DataLoader(Data().dataset, 16)))  # what a loader draws
    assert torch.equal(drawn[0], torch.get_rng_state())


class Averages(Net):
    """Logs in every way that sums up over an epoch, and what sums up beside it; reads both."""

    def __init__(self) -> None:
        super().__init__()
        shared = {"accuracy": MulticlassAccuracy(3), "recall": MulticlassRecall(3)}
        self.mean, self.all, self.seen = MeanMetric(), MetricCollection(shared), CatMetric()
        self.best, self.span = MaxMetric(), MinMaxMetric(MeanMetric())
        self.read: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("mean_loss", loss, on_step=True, on_epoch=True, batch_size=batch_idx + 1)
        self.log("sum_loss", loss, on_step=False, on_epoch=True, reduce_fx=torch.sum)
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx=max)
        self.log("least", loss, on_step=False, on_epoch=True, reduce_fx="min")
        self.mean(loss)
        self.log("metric", self.mean, on_step=True, on_epoch=True)
        self.all.update(torch.randn(4, 3), torch.randint(3, (4,)))
        self.seen.update(loss)
        self.best.update(loss)  # which is never reset
        self.span.update(loss)
        self.span.compute()
        if batch_idx == 0:
            self.log("first", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("late", float(batch_idx), on_step=False, on_epoch=True, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.log_dict({f"all_{name}": value for name, value in self.all.compute().items()})
        self.log("seen", self.seen.compute().std())
        self.log("best", self.best.compute())
        self.log_dict(self.span.compute())
        self.all.reset()
        self.seen.reset()
        metrics = self.trainer.callback_metrics
        self.read.append({name: float(value) for name, value in sorted(metrics.items())})
        assert metrics["mean_loss_epoch"] > 0


@pytest.mark.parametrize("spot", SPOTS)
def test_averages_over_the_training_epoch_go_on(spot: str, tmp_path: Path) -> None:
    modules: list[Averages] = []

    def module() -> Averages:
        modules.append(Averages())
        return modules[-1]

    watch = lambda: [EarlyStopping("mean_loss_epoch", patience=9)]  # noqa: E731
    ResumableRun(module, callbacks=watch, spots=(spot,)).check(tmp_path)
    whole, *_, resumed = (m.read for m in modules)
    assert len(whole) == 3
    assert len(resumed) >= 1
    assert differences(resumed, whole[-len(resumed) :]) == []
    assert len({values["mean_loss_epoch"] for values in whole}) == 3


def test_negative_control_without_the_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = lambda: [EarlyStopping("mean_loss_epoch", patience=9)]  # noqa: E731
    run = ResumableRun(Averages, callbacks=watch, options=options(max_epochs=1), spots=("batch2",))
    straight = run.fit(tmp_path)
    monkeypatch.setattr(
        lora_lightning.training.resume.run_state, "continue_metrics", lambda module, saved: None
    )
    resumed = run.fit(tmp_path / "resumed", tmp_path / "batch2.ckpt")
    assert any("best_score" in path for path in differences(straight, resumed))


class ByGroup(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("far", loss, on_epoch=True, sync_dist=True, sync_dist_group="a group")
        return loss


def test_an_average_of_a_process_group_begins_anew(tmp_path: Path) -> None:
    run = ResumableRun(ByGroup, spots=("batch2",))
    run.fit(tmp_path)
    with pytest.warns(UserWarning, match="'far' is logged with a sync_dist_group, which no check"):
        run.fit(tmp_path / "resumed", tmp_path / "batch2.ckpt")


@pytest.mark.parametrize(
    ("saved", "there", "set_to"),
    [
        (["a"], 1, {None: "a"}),
        (["a"], 2, {None: "a"}),  # DDP: each process saves its current device's
        (["a", "b"], 2, {0: "a", 1: "b"}),
        (["a", "b"], 1, {0: "a"}),  # fewer are visible than were
        (["a"], 0, {}),
        ([], 2, {}),
    ],
)
def test_random_states_of_cuda_devices(
    monkeypatch: pytest.MonkeyPatch, saved: list[str], there: int, set_to: dict[Any, str]
) -> None:
    found: dict[Any, str] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device=None: found.update({device: state})
    )
    set_random_state({**random_state(), "cuda": saved})
    assert found == set_to


def test_a_cuda_device_that_is_not_used_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process forked from one that uses it cannot; in others a first call takes memory there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["state"])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert random_state()["cuda"] == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert random_state()["cuda"] == ["state"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_on_cuda(tmp_path: Path, precision: Any, monkeypatch: Any) -> None:
    """Dropout draws from the device's generator; the gradient scaler goes on as well."""
    device = {"accelerator": "gpu", "devices": 1, "precision": precision}
    on_device = ResumableRun(options=options(**device, accumulate_grad_batches=3))
    on_device.check(tmp_path)
    straight = on_device.fit(tmp_path / "broken")
    original = lora_lightning.training.resume.run_state.set_random_state
    monkeypatch.setattr(
        lora_lightning.training.resume.run_state,
        "set_random_state",
        lambda state: original({**state, "cuda": []}),
    )
    broken = on_device.fit(tmp_path / "other", tmp_path / "broken/batch9.ckpt")
    assert any("lora_B" in path for path in differences(straight, broken))
