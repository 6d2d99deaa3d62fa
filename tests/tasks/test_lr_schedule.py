"""The learning rate's curve, counted in optimizer steps, and what decays."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import get_scheduler

from lora_lightning import LoraCallback, LoraConfig, inject_adapter
from lora_lightning.errors import ConfigError
from lora_lightning.tasks import lr_schedule
from lora_lightning.tasks.lr_schedule import Schedule
from lora_lightning.tasks.pretrained_task import PretrainedTask, decay_groups
from tests.helpers.lightning_modules import make_trainer

# torchdata's loader sets a vital sign of torch, which torch 2.13 asks not to.
pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")
BATCHES = 10


class Task(PretrainedTask):
    """A network of two layers in place of a pretrained one; remembers rates and batches."""

    def __init__(self, **options: Any) -> None:
        super().__init__("no model", **{"learning_rate": 1.0, **options})
        self.rates: list[float] = []
        self.seen: list[float] = []

    def configure_model(self) -> None:
        if self.network is None:
            torch.manual_seed(0)  # the same base in every run
            self.network = nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Linear(4, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch.sum().item())
        return self.network(batch).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(torch.arange(float(BATCHES))[:, None])


def loader(kind: Any = DataLoader, **options: Any) -> Any:
    return kind(torch.arange(float(BATCHES))[:, None], batch_size=1, **options)


def curve(name: str, warmup: int, total: int) -> list[float]:
    """What transformers gives."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(name, optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("shape", NAMES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 11), (5, 5)])
def test_the_curves_are_those_of_transformers(shape: Any, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = Schedule(optimizer, shape, 0.5, warmup)
    schedule.begin(total)
    found = [schedule.factor(step) for step in range(total)]
    assert found == pytest.approx(curve(NAMES[shape], warmup, total), abs=1e-12)
    assert schedule.factor(total) == pytest.approx(1.0 if shape == "constant" else 0.0)


def accumulated(folder: Path) -> list[float]:
    """Two epochs of 10 batches, 4 a step: 3 steps an epoch, the last of 2 batches."""
    task = Task(warmup_fraction=1 / 3, lr_schedule="cosine")
    make_trainer(folder, max_epochs=2, accumulate_grad_batches=4).fit(task, loader())
    return task.rates


def test_steps_are_the_optimizers_under_accumulation(tmp_path: Path) -> None:
    assert accumulated(tmp_path) == pytest.approx(curve("cosine", 2, 6))


def test_negative_control_that_counts_batches(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lr_schedule.math, "ceil", lambda x: BATCHES)
    assert accumulated(tmp_path) != pytest.approx(curve("cosine", 2, 6))


def test_accumulation_that_changes_with_the_epoch(tmp_path: Path) -> None:
    task, change = Task(), GradientAccumulationScheduler({0: 1, 1: 4})
    make_trainer(tmp_path, change, max_epochs=2).fit(task, loader())
    assert task.rates == pytest.approx(curve("linear", round(0.1 * 13), 13))


def test_max_steps_ends_the_curve(tmp_path: Path) -> None:
    task = Task(warmup_steps=2)
    make_trainer(tmp_path, max_epochs=2, max_steps=7).fit(task, loader())
    assert task.rates == pytest.approx(curve("linear", 2, 7))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_gradients_are_clipped_in_any_precision(tmp_path: Path, precision: Any) -> None:
    task = Task()
    make_trainer(tmp_path, max_steps=2, precision=precision, gradient_clip_val=0.1).fit(
        task, loader()
    )
    norms = torch.stack([p.grad.norm() for p in task.parameters() if p.grad is not None])
    assert norms.norm().item() == pytest.approx(0.1, rel=0.01)


# -- resume ----------------------------------------------------------------------------------------


class Stop(Callback):
    """Ends a run after some batches, as a crash does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


def resumed(folder: Path, epochs: int, stop: int, task: Any, *others: Any) -> list[float]:
    """The rates of a run of 4 epochs that goes on where one of `epochs` ended or was stopped."""
    first = make_trainer(folder, Stop(stop), *others, max_epochs=epochs)
    with suppress(InterruptedError):
        first.fit(task(), loader(StatefulDataLoader))
    first.save_checkpoint(folder / "last.ckpt")
    second = task()
    trainer = make_trainer(folder, *others, max_epochs=4)
    trainer.fit(second, loader(StatefulDataLoader), ckpt_path=folder / "last.ckpt")
    return second.rates


@pytest.mark.parametrize(("epochs", "stop"), [(4, 13), (2, -1)], ids=["crashed", "prolonged"])
def test_a_resumed_run_is_on_the_whole_runs_curve(tmp_path: Path, epochs: int, stop: int) -> None:
    straight = Task(lr_schedule="cosine")
    make_trainer(tmp_path, max_epochs=4).fit(straight, loader())
    rates = resumed(tmp_path, epochs, stop, lambda: Task(lr_schedule="cosine"))
    assert rates == straight.rates[-len(rates) :]  # to the last bit
    assert len(rates) == (27 if stop == 13 else 20)


def test_a_resumed_run_is_on_the_curve_that_it_asks_for(tmp_path: Path) -> None:
    tasks = iter([Task(), Task(lr_schedule="cosine", warmup_steps=25)])
    rates = resumed(tmp_path, 2, -1, lambda: next(tasks))
    assert rates == pytest.approx(curve("cosine", 25, 40)[20:])


def test_negative_control_whose_schedule_stays_where_the_shorter_run_ended(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def begin(self: Schedule, total_steps: float, trial: bool) -> None:
        self.total_steps, self.warmup_steps = total_steps, round(0.1 * total_steps)

    monkeypatch.setattr(Schedule, "begin", begin)
    with pytest.raises(AssertionError):
        test_a_resumed_run_is_on_the_whole_runs_curve(tmp_path, 2, -1)


def test_a_longer_run_with_adapters(tmp_path: Path) -> None:
    lora = {"r": 1, "target_modules": ["0"]}
    straight = Task()
    make_trainer(tmp_path, LoraCallback(**lora), max_epochs=4).fit(straight, loader())
    rates = resumed(tmp_path, 2, -1, Task, LoraCallback(**lora))
    assert rates == straight.rates[20:]


def mid_epoch(folder: Path, task: Any) -> list[float]:
    """The batches after a resume in mid-epoch, of a loader that keeps its position."""
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        make_trainer(folder, saver, Stop(3)).fit(task(), loader(StatefulDataLoader))
    second = task()
    make_trainer(folder).fit(second, loader(StatefulDataLoader), ckpt_path=folder / "last.ckpt")
    return second.seen


def test_the_schedule_does_not_cost_a_stateful_loader_its_position(tmp_path: Path) -> None:
    # The third batch was trained on, but the run crashed before it was saved.
    assert mid_epoch(tmp_path, Task) == [float(i) for i in range(2, BATCHES)]


class AsksAtOnce(Task):
    """Asks for the length while optimizers are made, as most do."""

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [LambdaLR(optimizer, lambda step: 1 - step / steps)]


def test_negative_control_that_asks_at_once(tmp_path: Path) -> None:
    assert mid_epoch(tmp_path, AsksAtOnce)[0] == 0.0  # Lightning #20550


# -- runs without a known end ----------------------------------------------------------------------


def test_a_stream_needs_max_steps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        make_trainer(tmp_path).fit(Task(), DataLoader(Stream()))
    assert str(error.value) == (
        "the learning rate falls to 0 at the last step, but the run has none: set "
        "trainer.max_steps, or trainer.max_epochs with data whose length is known; or keep it "
        "constant. (model.lr_schedule)"
    )
    with pytest.raises(ConfigError, match=r"say how many are warm-up .* \(model.warmup_steps\)"):
        make_trainer(tmp_path).fit(Task(lr_schedule="constant"), DataLoader(Stream()))

    task = Task(warmup_steps=1)
    make_trainer(tmp_path, max_steps=4, max_epochs=-1).fit(task, DataLoader(Stream()))
    assert task.rates == pytest.approx(curve("linear", 1, 4))
    endless = Task(lr_schedule="constant", warmup_steps=4)
    make_trainer(tmp_path).fit(endless, DataLoader(Stream()))
    assert endless.rates == [0, 0.25, 0.5, 0.75, *[1.0] * 6]


def test_a_warmup_longer_than_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        make_trainer(tmp_path, accumulate_grad_batches=4).fit(Task(warmup_steps=10), loader())
    assert str(error.value) == (
        "warmup_steps=10, but the whole run has 3 optimizer steps: the learning rate would not "
        "reach its peak. (model.warmup_steps)"
    )


@pytest.mark.slow
def test_trials_may_end_in_warmup(tmp_path: Path) -> None:
    class Sized(LightningDataModule):
        batch_size = 1

        def train_dataloader(self) -> Any:
            return DataLoader(torch.arange(64.0)[:, None], batch_size=self.batch_size)

    make_trainer(tmp_path, fast_dev_run=1).fit(Task(warmup_steps=9), loader())
    task, data = Task(warmup_steps=9), Sized()
    trainer = make_trainer(tmp_path, max_epochs=3)
    Tuner(trainer).scale_batch_size(task, datamodule=data, max_trials=2, steps_per_trial=2)
    assert data.batch_size == 4
    found = Tuner(trainer).lr_find(task, datamodule=data, num_training=5, min_lr=1e-4)
    assert found.results["lr"][0] == 1e-4  # the search's own schedule, not the task's
    task.rates.clear()
    trainer.fit(task, data)
    assert task.rates == pytest.approx([task.learning_rate * r for r in curve("linear", 9, 48)])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"lr_schedule": "cosin"},
            "lr_schedule='cosin' is not known. Did you mean 'cosine'? Known are linear, cosine, "
            "constant. (model.lr_schedule)",
        ),
        (
            {"warmup_steps": -1},
            "warmup_steps must be 0 or more, found -1. (model.warmup_steps)",
        ),
        (
            {"learning_rate": -1e-4},
            "learning_rate must be 0 or more, and finite, found -0.0001. (model.learning_rate)",
        ),
        (
            {"weight_decay": math.inf},
            "weight_decay must be 0 or more, and finite, found inf. (model.weight_decay)",
        ),
    ],
)
def test_what_is_no_curve_or_rate(options: Any, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Task(**options)
    assert str(error.value) == text


# -- weight decay ----------------------------------------------------------------------------------


def test_biases_norms_and_vectors_of_adapters_do_not_decay() -> None:
    task = Task()
    task.configure_model()
    inject_adapter(task, LoraConfig(r=1, use_dora=True, target_modules=["0"]))
    task.requires_grad_(True)
    names = {id(p): name for name, p in task.named_parameters()}
    groups = decay_groups(task, [{"params": list(task.parameters()), "lr": 2.0}])
    decays = {names[id(p)]: group.get("weight_decay") for group in groups for p in group["params"]}
    prefix = "network.0.adapters.default."
    assert decays == {
        "network.0.weight": None,
        f"{prefix}lora_A": None,
        f"{prefix}lora_B": None,
        "network.2.weight": None,
        "network.0.bias": 0.0,
        f"{prefix}lora_magnitude_vector": 0.0,
        "network.1.weight": 0.0,
        "network.1.bias": 0.0,
        "network.2.bias": 0.0,
    }
    assert all(group["lr"] == 2.0 for group in groups)


def test_decay_acts_in_training(tmp_path: Path) -> None:
    """AdamW without a gradient: p (1 - lr weight_decay), and biases stay."""
    task = Task(weight_decay=0.5, learning_rate=0.1, lr_schedule="constant", warmup_steps=0)
    task.training_step = lambda batch: sum(p.sum() * 0 for p in task.parameters())  # type: ignore[method-assign]
    task.configure_model()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    make_trainer(tmp_path, max_steps=2).fit(task, loader())
    for name, parameter in task.named_parameters():
        matrix = name in ("network.0.weight", "network.2.weight")
        factor = math.pow(1 - 0.1 * 0.5, 2) if matrix else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


@pytest.mark.parametrize(("saved", "asked"), [(0.0, 0.1), (0.2, 0.1), (0.1, 0.0)])
def test_a_resumed_run_keeps_its_weight_decay(tmp_path: Path, saved: float, asked: float) -> None:
    first = make_trainer(tmp_path, max_epochs=1)
    first.fit(Task(weight_decay=saved), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    again: Any = {"train_dataloaders": loader(), "ckpt_path": tmp_path / "a.ckpt"}
    text = rf"weight_decay={asked:g} would have .* is {saved:g}\. .* \(model.weight_decay\)"
    second = make_trainer(tmp_path, max_epochs=2)
    with pytest.raises(ConfigError, match=text):
        second.fit(Task(weight_decay=asked), **again)
    make_trainer(tmp_path, max_epochs=2).fit(Task(weight_decay=saved), **again)
