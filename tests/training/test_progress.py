"""What the progress bar and the loggers are told of speed, learning rate and memory."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import CSVLogger

from lora_lightning import LoraCallback, SequenceClassification, TextClassificationDataModule
from lora_lightning.callbacks import TrainingProgress
from lora_lightning.training import stopwatch as stopwatch_module
from lora_lightning.training.progress import left_out, readable_time
from lora_lightning.training.stopwatch import Stopwatch
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.tiny_bert import save_tiny_bert


class Clock:
    """A clock that is moved on by hand."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: Any) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch_module, "time", clock)
    return clock


class Slow(Net):
    """On a clock of its own: 2 s a training batch, 50 s a validation batch."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.clock.now += 2
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 50
        super().validation_step(batch, batch_idx)


class Counting(Slow):
    """100 tokens a batch."""

    tokens_seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.tokens_seen += 100
        return super().training_step(batch, batch_idx)


class SlowSaver(ModelCheckpoint):
    """Writing takes 1000 s."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(**options)
        self.clock = clock

    def on_save_checkpoint(self, *_: Any) -> None:
        self.clock.now += 1000


class Sampler(Callback):
    """Does something else for 300 s after each batch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        with left_out(trainer):
            self.clock.now += 300


def logged(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in logged(folder) if row.get(name)]


def fit(folder: Path, module: LightningModule, *callbacks: Any, **options: Any) -> Any:
    progress = TrainingProgress()
    options = {"logger": CSVLogger(folder), "log_every_n_steps": 1, **options}
    trainer = make_trainer(folder, progress, *callbacks, **options)
    trainer.fit(module, Data())  # 4 batches of 16
    return trainer


def test_samples_per_second(tmp_path: Path, clock: Clock, capsys: Any) -> None:
    fit(tmp_path, Slow(clock), Sampler(clock), SlowSaver(clock, every_n_train_steps=1))
    assert column(tmp_path, "samples_per_second") == [8.0] * 4  # 16 in 2 s
    text = "trained on 64 samples in 8.0 s, 8.0 samples/s, without validation and checkpoints\n"
    assert text in capsys.readouterr().out


def test_what_is_left_out_can_be_seen(tmp_path: Path, clock: Clock, monkeypatch: Any) -> None:
    monkeypatch.setattr(Stopwatch, "stop", lambda self: None)
    fit(tmp_path, Slow(clock), Sampler(clock), SlowSaver(clock, every_n_train_steps=1))
    assert column(tmp_path, "samples_per_second")[1] == pytest.approx(16 / (2 + 300 + 1000))


def test_weights_only_checkpoints_are_left_out(tmp_path: Path, clock: Clock) -> None:
    class Saver(SlowSaver):
        def _save_checkpoint(self, trainer: Any, path: str) -> None:
            super()._save_checkpoint(trainer, path)

    class SlowState(Slow):
        def on_save_checkpoint(self, checkpoint: Any) -> None:
            self.clock.now += 1000

    fit(tmp_path, SlowState(clock), Saver(clock, save_weights_only=True, every_n_train_steps=1))
    assert column(tmp_path, "samples_per_second") == [8.0] * 4


def test_validation_in_the_middle_of_an_epoch(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, Slow(clock), max_epochs=2, val_check_interval=1)
    assert column(tmp_path, "samples_per_second") == [8.0] * 8


def test_accumulation(tmp_path: Path, clock: Clock) -> None:
    """A step counts as a whole: with what its first batches took."""

    class Uneven(Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.clock.now += 4 if batch_idx % 2 == 0 else 0
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Uneven(clock), accumulate_grad_batches=2)
    assert column(tmp_path, "samples_per_second") == [32 / 8] * 2


def test_tokens_per_second(tmp_path: Path, clock: Clock, capsys: Any) -> None:
    module = Counting(clock)
    module.tokens_seen = 7000  # of an earlier run
    trainer = fit(tmp_path, module)
    assert column(tmp_path, "tokens_per_second") == [50.0] * 4
    assert "trained on 400 tokens in 8.0 s, 50.0 tokens/s" in capsys.readouterr().out
    assert trainer.progress_bar_metrics["tokens/s"] == "50"


def test_batches_that_do_not_say_their_size(tmp_path: Path, clock: Clock) -> None:
    class Opaque:
        def __init__(self, parts: Any) -> None:
            self.parts = parts

    class OfObjects(Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.clock.now += 2
            return torch.nn.functional.cross_entropy(self(batch.parts[0]), batch.parts[1])

    loader = torch.utils.data.DataLoader(
        Data().dataset,
        batch_size=16,
        collate_fn=lambda rows: Opaque([torch.stack(x) for x in zip(*rows, strict=True)]),
    )
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    make_trainer(tmp_path, TrainingProgress(), **options).fit(OfObjects(clock), loader)
    assert column(tmp_path, "batches_per_second") == [0.5] * 4


def test_the_learning_rate_is_that_of_the_step(tmp_path: Path, clock: Clock) -> None:
    class Scheduled(Slow):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.head.parameters(), "lr": 1.0},
                {"params": self.body.parameters(), "lr": 2.0},
                {"params": self.embed.parameters(), "lr": 3.0, "name": "embed"},
            ]
            optimizer = torch.optim.SGD(groups)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    trainer = fit(tmp_path, Scheduled(clock))
    assert column(tmp_path, "lr") == [1.0, 0.5, 0.25, 0.125]
    assert column(tmp_path, "lr_2") == [2.0, 1.0, 0.5, 0.25]
    assert column(tmp_path, "lr_embed") == [3.0, 1.5, 0.75, 0.375]
    assert trainer.progress_bar_metrics["lr"] == "1.2e-01"  # the bar has room for one
    assert trainer.progress_bar_metrics.keys() == {"samples/s", "lr", "peak memory"}


def test_peak_memory(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="not on Windows")
    fit(tmp_path, Net())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seen = column(tmp_path, "peak_memory_gb")
    assert 0.9 * most < seen[0] <= seen[-1] <= most * (1 + 1e-6)  # logged in fp32


def test_few_measurements(tmp_path: Path, clock: Clock) -> None:
    """Every batch at first, every tenth later, and what the Trainer logs."""

    class Watching(TrainingProgress):
        def __init__(self) -> None:
            super().__init__()
            self.measured: list[int] = []

        def _measure(self, trainer: Any) -> float:
            self.measured.append(self._steps)
            return super()._measure(trainer)

    progress = Watching()
    options = {"max_epochs": 9, "logger": CSVLogger(tmp_path), "log_every_n_steps": 16}
    make_trainer(tmp_path, progress, **options).fit(Slow(clock), Data())  # 36 batches
    assert progress.measured == [*range(1, 11), 16, 20, 30, 32, 36]
    assert len(column(tmp_path, "samples_per_second")) == 2


def test_the_trainer_is_as_it_was(tmp_path: Path) -> None:
    class Fails(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    progress = TrainingProgress()
    trainer = make_trainer(tmp_path, progress)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Fails(), Data())
    assert "save_checkpoint" not in vars(trainer)
    trainer.fit(Net(), Data())
    assert "save_checkpoint" not in vars(trainer)


def test_our_tasks_bring_it_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good film", "label": 1}\n{"text": "bad film", "label": 0}\n' * 4)
    model = str(save_tiny_bert(tmp_path / "model"))
    for own in ([], [TrainingProgress()]):
        trainer = make_trainer(tmp_path, LoraCallback(r=2, modules_to_save=["classifier"]), *own)
        data = TextClassificationDataModule(str(path), val=str(path), max_length=16)
        trainer.fit(SequenceClassification(model), data)
        found = [c for c in trainer.callbacks if isinstance(c, TrainingProgress)]
        assert len(found) == 1
        assert found == own or not own
        assert "samples/s" in trainer.progress_bar_metrics


@pytest.mark.parametrize("theme", [None, RichProgressBarTheme(metrics_format=".1f")])
def test_the_bar_has_a_line_for_each_metric(
    tmp_path: Path, theme: Any, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a line of its own can be cut where it is too long
    bar = RichProgressBar(**({} if theme is None else {"theme": theme}))
    fit(tmp_path, Net(), bar, enable_progress_bar=True)
    assert bar.theme.metrics_text_delimiter == ("\n" if theme is None else " ")
    assert "lr: 1.0e-02" in capsys.readouterr().out


def on_two(folder: str) -> list[float]:
    """Rank 1 counts three times the tokens."""
    clock = Clock()
    stopwatch_module.time = clock  # type: ignore[attr-defined]

    class Ranked(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.tokens_seen += 200 * self.global_rank
            return super().training_step(batch, batch_idx)

    options: Any = {"strategy": "ddp", "devices": 2, "log_every_n_steps": 1}
    trainer = make_trainer(Path(folder), TrainingProgress(), **options)
    trainer.fit(Ranked(clock), Data())
    return [float(trainer.callback_metrics["tokens_per_second"])]


@pytest.mark.slow
def test_all_processes_count(tmp_path: Path) -> None:
    assert on_processes(2, on_two, str(tmp_path)) == [[200.0], [200.0]]  # (100 + 300) / 2 s


def test_stopwatch(clock: Clock) -> None:
    watch = Stopwatch()
    watch.start()
    clock.now += 1
    with watch.stopped():
        clock.now += 10
        with watch.stopped():
            clock.now += 10
        assert watch.seconds() == 1
    clock.now += 2
    assert watch.seconds() == 3
    assert time.perf_counter() != clock.now


def test_readable_time() -> None:
    assert [readable_time(s) for s in (45.24, 312, 7380)] == ["45.2 s", "5 min 12 s", "2 h 3 min"]
