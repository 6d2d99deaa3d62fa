"""What a run shows on a terminal and without one, beside what it logged."""

from __future__ import annotations

import csv
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning import LoraCallback, TerminalProgress, TrainingProgress
from lora_lightning.training import run_lines
from lora_lightning.training.run_lines import folded
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.paths import child_environment
from tests.helpers.processes import on_processes

OPTIONS: dict[str, Any] = {"r": 2, "target_modules": ["embed"], "modules_to_save": ["head"]}


class Shown(Net):
    """Says with `prog_bar` what is worth seeing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("twice", 2 * loss, prog_bar=True)
        return loss


def run(folder: Path, module: LightningModule, *callbacks: Any, **options: Any) -> Any:
    callbacks = callbacks or (TerminalProgress(),)
    options = {"logger": CSVLogger(folder), "log_every_n_steps": 2, **options}
    data = options.pop("data", None) or Data()  # 4 batches of 16
    resumed = options.pop("ckpt_path", None)
    torch.manual_seed(0)
    trainer = make_trainer(
        folder, LoraCallback(**OPTIONS), *callbacks, **{**options, "enable_progress_bar": True}
    )
    trainer.fit(module, data, ckpt_path=resumed)
    return trainer


def steps(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


def value(line: str, name: str) -> float | None:
    found = re.search(rf"  {re.escape(name)} (\S+)", line)
    return float(found.group(1)) if found else None


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """Metrics by name and step; loggers count from 0."""
    (path,) = folder.rglob("metrics.csv")
    values: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        for name, text in row.items():
            if text:
                values.setdefault(name, {})[int(row["step"]) + 1] = float(text)
    return values


def differences(text: str, folder: Path, *names: str) -> list[str]:
    """The logged values that no line shows, and those that a line shows otherwise."""
    shown: dict[str, dict[int, float]] = {}
    for line in steps(text):
        step = int(re.match(r"step (\d+)", line).group(1))  # type: ignore[union-attr]
        for name in names:
            if (found := value(line, name)) is not None:
                shown.setdefault(name, {})[step] = found
    true = logged(folder)
    return [
        f"{name} of step {step}"
        for name in names
        for step, expected in true[name].items()
        if shown.get(name, {}).get(step) != float(f"{expected:.4g}")
    ]


def test_lines_without_a_terminal(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path, Shown(), max_epochs=3)
    out = capsys.readouterr().out
    lines = steps(out)
    assert [line.split("  ")[0] for line in lines if "val_loss" not in line] == [
        f"step {step}/12" for step in (2, 4, 6, 8, 10, 12)
    ]
    assert [line.split("  ")[0] for line in lines if "val_loss" in line] == [
        "step 4/12", "step 8/12", "step 12/12"
    ]  # fmt: skip
    assert differences(out, tmp_path, "loss", "twice", "val_loss") == []
    assert not {"\x1b", "\r"} & {*out}
    for line in lines:
        if "val_loss" in line:
            continue
        (speed,) = re.findall(r"  ([\d.,]+) steps/s", line) or re.findall(r"  (\S+) s/step", line)
        assert float(speed.replace(",", "")) > 0
        assert ("left" in line) == ("12/12" not in line)
    rates = [value(line, "lr") for line in lines if "val_loss" not in line]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule, true = cosine(optimizer, T_max=10), []
    for _ in range(3):  # epochs, of two lines each
        true += 2 * [float(f"{optimizer.param_groups[0]['lr']:.1e}")]
        optimizer.step()
        schedule.step()
    assert rates == true


def test_a_value_of_another_step_would_be_seen(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test's own test: a display that is a look behind."""
    before: list[list[str]] = [[]]
    right = run_lines.step_items

    def late(trainer: Any, outputs: Any) -> list[str]:
        before.append(right(trainer, outputs))
        return before[-2]

    monkeypatch.setattr("lora_lightning.training.terminal_progress.step_items", late)
    run(tmp_path, Shown(), max_epochs=2)
    assert "loss of step 4" in differences(capsys.readouterr().out, tmp_path, "loss")


@pytest.mark.parametrize("bar", [False, True])
def test_training_goes_on_as_if_nothing_was_shown(tmp_path: Path, bar: bool) -> None:
    def final(folder: Path, *callbacks: Any) -> dict[str, torch.Tensor]:
        saver = ModelCheckpoint(folder, filename="last", save_weights_only=True)
        run(folder, Shown(), saver, *callbacks, max_epochs=2)
        return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]

    plain, shown = final(tmp_path / "a"), final(tmp_path / "b", TerminalProgress(bar=bar))
    assert plain.keys() == shown.keys()
    assert all(torch.equal(plain[key], shown[key]) for key in plain)


class Silent(Net):
    """Logs nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_a_module_that_logs_nothing(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path / "a", Silent())
    lines = steps(capsys.readouterr().out)
    assert len(lines) == 2  # and no line for a validation of nothing
    run(tmp_path / "b", Net())
    true = logged(tmp_path / "b")["loss"]
    assert [value(line, "loss") for line in lines] == [float(f"{true[s]:.4g}") for s in (2, 4)]


class Many(Net):
    """A hundred metrics, not all of them numbers, one with a name that a terminal would obey."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("bad\x1b[2J", loss, prog_bar=True)
        self.log("nothing", loss * float("nan"), prog_bar=True)
        for number in range(100):
            self.log(f"m{number}", loss, prog_bar=True)
        return loss


def test_many_metrics(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path, Many())
    out = capsys.readouterr().out
    line = steps(out)[0]
    assert r"  bad\x1b[2J " in line
    assert "\x1b" not in out
    assert "  nothing nan  m0 " in line
    assert "  + 97 more  lr " in line  # loss, four of these, and two above: 103 - 6


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([Data().dataset[i] for i in range(64)])


class WithoutLength(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), batch_size=16)


def test_no_end_is_known(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path, Net(), data=WithoutLength(), max_epochs=2)
    lines = steps(capsys.readouterr().out)
    assert [line.split("  ")[0] for line in lines] == ["step 2", "step 4", "step 6", "step 8"]
    assert not [line for line in lines if "left" in line]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"max_steps": 3, "max_epochs": -1}, ["2/3", "3/3"]),
        ({"accumulate_grad_batches": 2, "max_epochs": 3}, ["2/6", "4/6", "6/6"]),
        ({"fast_dev_run": True}, ["1/1"]),
        ({"max_epochs": -1, "max_time": "00:00:00:00"}, None),  # ends, by the clock alone
    ],
)
def test_ways_to_end(tmp_path: Path, capsys: Any, options: Any, shown: Any) -> None:
    run(tmp_path, Net(), **options)
    lines = [line for line in steps(capsys.readouterr().out) if "val_loss" not in line]
    assert shown is None or [line.split("  ")[0] for line in lines] == [f"step {s}" for s in shown]
    assert not [line for line in lines if "-" in line.rpartition("steps/s")[2]]  # no time below 0


class Two(Silent):
    """A GAN's two optimizers, each of whose steps the Trainer counts."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(Silent.training_step(self, batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.embed, self.head)]


def test_two_optimizers(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path, Two(), max_steps=8, max_epochs=-1)
    lines = steps(capsys.readouterr().out)
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 2/4", "lr 1.0e-01"],
        ["step 4/4", "lr 1.0e-01"],
    ]


class Loaders(Data):
    def val_dataloader(self) -> Any:
        return [DataLoader(self.dataset, batch_size=size) for size in (16, 32)]


class Numbered(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_rank", float(dataloader_idx))


def test_several_validation_loaders(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path, Numbered(), data=Loaders())
    out = capsys.readouterr().out
    names = [f"val_{name}/dataloader_idx_{i}" for i in (0, 1) for name in ("loss", "rank")]
    assert differences(out, tmp_path, *names) == []
    assert value(steps(out)[-1], "val_rank/dataloader_idx_1") == 1


def test_a_resumed_run_counts_on(tmp_path: Path, capsys: Any) -> None:
    saver = ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=3)
    run(tmp_path, Net(), saver, TerminalProgress(), max_steps=3, max_epochs=-1)
    capsys.readouterr()
    options: dict[str, Any] = {"max_steps": 6, "max_epochs": -1}
    options["ckpt_path"] = str(tmp_path / "one.ckpt")
    run(tmp_path / "again", Net(), **options)
    out = capsys.readouterr().out
    lines = [line.split("  ")[0] for line in steps(out) if "val_loss" not in line]
    assert lines == ["step 4/6", "step 6/6"]
    assert differences(out, tmp_path / "again", "loss", "val_loss") == []


def test_speed_of_training_progress(tmp_path: Path, capsys: Any) -> None:
    """Samples, and memory, where something measures them."""
    run(tmp_path, Net(), TerminalProgress(), TrainingProgress())
    lines = [line for line in steps(capsys.readouterr().out) if "val_loss" not in line]
    true = logged(tmp_path)["samples_per_second"]
    for line, step in zip(lines, (2, 4), strict=True):
        (speed,) = re.findall(r"  ([\d,.]+) samples/s  [\d.]+ [MG]B", line)
        assert float(speed.replace(",", "")) == pytest.approx(true[step], rel=0.01)


def on_two(folder: str) -> str:
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as out:
        run(Path(folder), Net(), strategy="ddp", devices=2, log_every_n_steps=1)
    return out.getvalue()


@pytest.mark.slow
def test_process_0_alone_shows(tmp_path: Path) -> None:
    first, second = on_processes(2, on_two, str(tmp_path))
    assert [line.split("  ")[0] for line in steps(first)] == ["step 1/2", "step 2/2", "step 2/2"]
    assert steps(second) == []


def test_items_are_not_split() -> None:
    items = ["step 5/40", "train_loss 5.446", "lr 1.0e-02", "x" * 50]
    lines = folded(items, 30).splitlines()
    assert lines == ["step 5/40  train_loss 5.446", "lr 1.0e-02", f"{'x' * 29}…"]
    assert folded(items, 200) == "  ".join(items)
    assert len(folded(items * 9, 30).splitlines()) == 3
    assert folded([], 30) == ""


PROGRAM = """
import sys
from pathlib import Path
from tests.training.test_terminal_progress import Shown, TerminalProgress, run
run(Path(sys.argv[1]), Shown(), max_epochs=2)
print("the end of it")
"""


def on_terminal(folder: Path, columns: int) -> str:
    """What a terminal of this width receives from a run in a process of its own."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = child_environment(TERM="xterm-256color", OMP_NUM_THREADS="1")
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], stdout=slave, stderr=slave, stdin=slave,
        env=environment, cwd=folder,
    )  # fmt: skip
    os.close(slave)
    received = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # how Linux says that nobody writes any more
            chunk = b""
        if not chunk:
            break
        received += chunk
    os.close(master)
    assert process.wait() == 0, received.decode()
    return received.decode()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_on_a_terminal(tmp_path: Path, columns: int) -> None:
    received = on_terminal(tmp_path, columns)
    assert "\x1b[" in received  # it is drawn
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", received)
    pieces = [line for line in re.split(r"[\r\n]+", text) if line]
    bars = [line for line in pieces if line.startswith("epoch ")]
    assert "epoch 2 of 2" in bars[-1]
    assert " 4/4 " in bars[-1]
    assert max(map(len, [*bars, *steps("\n".join(pieces))])) <= columns
    for foreign in ("v_num", "Epoch", "it/s"):
        assert foreign not in text
    last = [line for line in pieces if line.startswith("step 8/8  loss")][-1]
    true = logged(tmp_path)
    assert value(last, "loss") == float(f"{true['loss'][8]:.4g}")
    assert value(last, "twice") == float(f"{true['twice'][8]:.4g}")
    assert differences("\n".join(pieces), tmp_path, "val_loss") == []
    assert pieces[-1] == "the end of it"
    assert received.rstrip().endswith("the end of it")  # below the bar, not in its place
    assert received.count("\x1b[?25l") == received.count("\x1b[?25h")  # the cursor is back
