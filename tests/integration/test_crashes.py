"""`kill -9` at random moments: every restart goes on, and the end is the same, bit for bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.plugins import AsyncCheckpointIO

from lora_lightning.training.checkpoint_io.files import DurableCheckpointIO
from tests.helpers.killable_process import KillableProcess, command, fit
from tests.helpers.tensors import assert_same_state, same_state

EPOCHS = 6  # of four batches
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "steps": ({"every_n_train_steps": 1, "save_last": True}, {}),
    "link": ({"every_n_train_steps": 2, "save_last": "link"}, {}),
    "accumulate": ({"every_n_train_steps": 1, "save_last": True}, {"accumulate_grad_batches": 3}),
    "background": ({"every_n_train_steps": 1, "save_last": True}, {"plugins": [AsyncCheckpointIO()]}),
    "epochs": ({"save_last": True, "monitor": "val_loss", "filename": "best"}, {}),
}  # fmt: skip


def killed_until_done(
    folder: Path, kind: str, delay: Callable[[], float], kills: Callable[[], bool]
) -> tuple[int, dict[str, Any]]:
    """How often a run was killed until it was through, and its adapters."""
    folder.mkdir()
    saver, options = KINDS[kind]
    count = 0
    while True:
        process = KillableProcess(fit, folder, EPOCHS, saver, options, log=folder / "log")
        code = process.end(delay() if kills() else None)
        if code == 0:
            return count, torch.load(folder / "done.pt", weights_only=True)
        assert code == -9, (folder / "log").read_text()
        count += 1
        check_all_checkpoints(folder / "checkpoints")


def check_all_checkpoints(folder: Path) -> None:
    """Whatever has the name of a checkpoint is a whole one, and once there was one, there is."""
    found = list(folder.glob("*.ckpt"))
    for path in found:
        if path.exists():  # the target of a link that a background writer has not got to yet
            DurableCheckpointIO().load_checkpoint(path, weights_only=True)
    seen = folder.with_name("seen")
    assert found or not seen.exists()
    if found:
        seen.touch()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The adapters of an uninterrupted run that writes no checkpoints."""
    results: dict[str, dict[str, Any]] = {}

    def get(kind: str) -> dict[str, Any]:
        steps = repr({k: v for k, v in KINDS[kind][1].items() if k != "plugins"})
        if steps not in results:
            folder = tmp_path_factory.mktemp("straight")
            options = KINDS[kind][1]
            assert KillableProcess(fit, folder, EPOCHS, {}, options, log=folder / "log").end() == 0
            results[steps] = torch.load(folder / "done.pt", weights_only=True)
        return results[steps]

    return get


def kill_often(folder: Path, kinds: Iterable[str], wanted: int, straight: Any, per_run: int) -> int:
    """Runs of these kinds, each through at last and as it should be, until `wanted` kills."""
    draw = random.Random(0)
    kills = 0
    for number, kind in enumerate(kinds):
        left = itertools.count()
        count, adapters = killed_until_done(
            folder / f"run{number}", kind, lambda: draw.uniform(0.1, 0.9),
            lambda left=left: next(left) < per_run,
        )  # fmt: skip
        assert same_state(adapters, straight(kind)), f"{kind}, run {number}"
        kills += count
        if kills >= wanted:
            break
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["steps", "link"])
def test_a_few_kills(kind: str, tmp_path: Path, straight: Any) -> None:
    kill_often(tmp_path, itertools.repeat(kind), 3, straight, per_run=5)


CONFIG = {
    "lora": {"r": 2, "lora_dropout": 0.2},
    "model": {"class_path": "tests.helpers.lightning_modules.Net"},
    "data": {"class_path": "tests.helpers.lightning_modules.Data"},
    "trainer": {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_last": True},
            }
        ],
    },
}


@pytest.mark.slow
def test_the_command_goes_on_with_last(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(CONFIG))
    draw = random.Random(0)
    log = tmp_path / "log"

    def call(directory: str, *arguments: str, after: float | None = None) -> int:
        typed = ["fit", "--config", "my.yaml", "--trainer.default_root_dir", directory, *arguments]
        return KillableProcess(command, tmp_path, *typed, log=log).end(after)

    assert call("straight") == 0
    folder = tmp_path / "killed/checkpoints"
    for _ in range(4):
        again = ["--ckpt_path", "last"] if list(folder.glob("*.ckpt")) else []
        assert call("killed", *again, after=draw.uniform(0.4, 1.2)) in (-9, 0), log.read_text()
    again = ["--ckpt_path", "last"] if list(folder.glob("*.ckpt")) else []
    assert call("killed", *again) == 0, log.read_text()
    ends = [tmp_path / run / "checkpoints/last.ckpt" for run in ("straight", "killed")]
    states = [torch.load(path, weights_only=True)["state_dict"] for path in ends]
    assert_same_state(*states)


@pytest.mark.slow
@pytest.mark.soak
def test_a_hundred_kills(tmp_path: Path, straight: Any) -> None:
    kills = kill_often(tmp_path, itertools.cycle(KINDS), 100, straight, per_run=12)
    assert kills >= 100
