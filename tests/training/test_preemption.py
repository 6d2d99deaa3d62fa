"""SIGTERM and SLURM's requeue: the run is saved at a safe point, ends as told, and goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lora_lightning import LoraCallback
from lora_lightning.cli.main import main
from lora_lightning.training.preemption import EXIT_CODE, Preemption
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.paths import child_environment
from tests.helpers.processes import on_processes
from tests.helpers.tensors import assert_same_state

EPOCHS = 4  # of four batches


class Signal(Callback):
    """Sends the process a signal in `hook` of the batch after `step` optimizer steps, once."""

    def __init__(self, signum: int, step: int, hook: str = "on_train_batch_start") -> None:
        self.signum = signum
        self.step = step
        self.sent = False
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step and not self.sent and not trainer.sanity_checking:
            self.sent = True
            os.kill(os.getpid(), self.signum)


def lora(**options: Any) -> LoraCallback:
    return LoraCallback(
        r=2,
        lora_dropout=0.2,
        target_modules=["embed", "body.2"],
        modules_to_save=["head"],
        **options,
    )


def fit(folder: Path, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> dict[str, Any]:
    seed_everything(7 if ckpt_path is None else 123, verbose=False)
    module = Net()
    make_trainer(folder, lora(), *callbacks, max_epochs=EPOCHS, **options).fit(
        module, Data(), ckpt_path=ckpt_path
    )
    return {key: value for key, value in module.state_dict().items() if ".adapters." in key}


def interrupted(folder: Path, *callbacks: Any, **options: Any) -> Any:
    """The exit code of a run that SIGTERM ends."""
    with pytest.raises(SIGTERMException) as caught:
        fit(folder, *callbacks, **options)
    return caught.value.code


def steps(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


WHEN: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    # hook in which the signal comes, after which step, step that is saved, options
    "at the start": ("on_train_batch_start", 0, 1, {}),
    "between batches": ("on_train_batch_start", 5, 6, {}),
    "in the optimizer's step": ("on_before_optimizer_step", 5, 6, {}),
    "at a batch's end": ("on_train_batch_end", 6, 6, {}),
    "in validation": ("on_validation_batch_start", 8, 9, {}),
    "in mid-accumulation": ("on_train_batch_start", 2, 2, {"accumulate_grad_batches": 3}),
    "mixed precision": ("on_train_batch_start", 5, 6, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("when", WHEN)
def test_sigterm_saves_and_the_run_goes_on_exactly(
    when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook, at, saved, options = WHEN[when]
    straight = fit(tmp_path / "straight", **options)
    before = signal.getsignal(signal.SIGTERM)
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    capsys.readouterr()
    assert interrupted(tmp_path, saver, Signal(signal.SIGTERM, at, hook), **options) == 143
    path = tmp_path / "last.ckpt"
    assert f"SIGTERM: saved {path}; go on with ckpt_path='last'" in capsys.readouterr().out
    assert steps(path) == saved
    assert signal.getsignal(signal.SIGTERM) is before
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    assert_same_state(fit(tmp_path, saver, ckpt_path="last", **options), straight)


def test_negative_control_lightning_alone_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Preemption, "watch", lambda *_: None)
    monkeypatch.setattr("lora_lightning.callback.set_exit_code", lambda *_: None)
    code = interrupted(
        tmp_path, ModelCheckpoint(tmp_path, save_last=True), Signal(signal.SIGTERM, 1)
    )
    assert code is None  # exit code 0, as if it were done
    assert not list(tmp_path.glob("*.ckpt"))


def test_in_the_last_validation_the_run_ends_as_ever(tmp_path: Path) -> None:
    straight = fit(tmp_path / "straight")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    signals = Signal(signal.SIGTERM, 16, "on_validation_batch_start")
    assert_same_state(fit(tmp_path, saver, signals), straight)
    assert signals.sent
    assert steps(tmp_path / "last.ckpt") == 16


def test_in_the_sanity_check_nothing_is_saved(tmp_path: Path) -> None:
    class Early(Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    assert interrupted(tmp_path, ModelCheckpoint(tmp_path, save_last=True), Early()) == 143
    assert not list(tmp_path.glob("*.ckpt"))


def test_without_save_last_it_is_kept_up_to_date(tmp_path: Path) -> None:
    """Or the run would be taken up at the same step for ever."""
    assert interrupted(tmp_path, ModelCheckpoint(tmp_path), Signal(signal.SIGTERM, 1)) == 143
    assert steps(tmp_path / "last.ckpt") == 2
    link = tmp_path.with_name("link")  # the same folder by another name
    link.symlink_to(tmp_path)
    again = {"ckpt_path": link / "last.ckpt"}
    assert interrupted(tmp_path, ModelCheckpoint(tmp_path), Signal(signal.SIGTERM, 9), **again)
    assert steps(tmp_path / "last.ckpt") == 10
    fit(tmp_path, ModelCheckpoint(tmp_path), ckpt_path="last")
    assert steps(tmp_path / "last.ckpt") == 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=3-step=16.ckpt", "last.ckpt"]
    fit(tmp_path / "other", ModelCheckpoint(tmp_path / "other"))
    assert not (tmp_path / "other/last.ckpt").exists()


def test_weights_only_savers_save_all_then(tmp_path: Path) -> None:
    straight = fit(tmp_path / "straight")
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, save_last=True)
    assert interrupted(tmp_path, saver, Signal(signal.SIGTERM, 5)) == 143
    assert saver.save_weights_only
    assert_same_state(fit(tmp_path, ModelCheckpoint(tmp_path), ckpt_path="last"), straight)


def test_without_a_saver_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert interrupted(tmp_path, Signal(signal.SIGTERM, 1)) == 143
    assert "SIGTERM: nothing was saved, as this Trainer writes no checkpoints" in (
        capsys.readouterr().out
    )
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_beside_savers_on_exceptions(tmp_path: Path) -> None:
    straight = fit(tmp_path / "straight")
    saver = ModelCheckpoint(tmp_path, save_on_exception=True, save_last=True)
    failed = OnExceptionCheckpoint(tmp_path, "failed")
    assert interrupted(tmp_path, saver, failed, Signal(signal.SIGTERM, 5)) == 143
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == [
        "epoch=0-step=4.ckpt", "failed.ckpt", "last.ckpt",
    ]  # fmt: skip
    for name in ("failed", "last"):
        again = fit(tmp_path / name, ckpt_path=tmp_path / f"{name}.ckpt")
        assert_same_state(again, straight)


def test_the_users_own_handler_is_called(tmp_path: Path) -> None:
    calls = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: calls.append(signum))
    try:
        assert interrupted(tmp_path, Signal(signal.SIGTERM, 1)) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]


def test_several_adapters_save_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = LoraCallback(r=2, target_modules=["embed"], adapter_name="second")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    assert interrupted(tmp_path, second, saver, Signal(signal.SIGTERM, 1)) == 143
    assert capsys.readouterr().out.count("SIGTERM: saved") == 1


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_evaluation_ends_with_the_code_too(entry: str, tmp_path: Path) -> None:
    hooks = {"validate": "on_validation_batch_start", "test": "on_test_batch_start"}
    own = Signal(signal.SIGTERM, 0, hooks.get(entry, "on_predict_batch_start"))
    trainer = make_trainer(tmp_path, lora(), own)
    if entry == "predict":  # Lightning's loop does not look
        assert len(trainer.predict(Net(), Data())) == 4
        return
    with pytest.raises(SIGTERMException) as caught:
        getattr(trainer, entry)(Net(), Data(), verbose=False)
    assert caught.value.code == EXIT_CODE


def test_ctrl_c_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path, saver, Signal(signal.SIGINT, 5))
        out = capsys.readouterr().out
        assert "last checkpoint: " in out
        assert "last.ckpt" in out
        with pytest.raises(SystemExit):
            fit(tmp_path, ModelCheckpoint(tmp_path / "other"), Signal(signal.SIGINT, 1))
        assert "interrupted before the first checkpoint: nothing is left to go on from" in (
            capsys.readouterr().out
        )
    finally:
        signal.signal(signal.SIGINT, before)


# -- SLURM -----------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A job of one task, whose `scontrol` notes how it is called."""
    variables = {
        "NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0",
        "NODEID": "0", "NODELIST": "node", "NTASKS_PER_NODE": "1", "NNODES": "1",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    calls, program = tmp_path / "calls", tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return lambda: calls.read_text().splitlines() if calls.exists() else []


class InStep(Callback):
    """Whether weights have moved since the batch began when a checkpoint is written."""

    def __init__(self) -> None:
        self.saved_in_step: list[bool] = []
        self.inside = False

    def on_train_batch_start(self, *_: Any) -> None:
        self.inside = True

    def on_train_batch_end(self, *_: Any) -> None:
        self.inside = False

    def on_save_checkpoint(self, *_: Any) -> None:
        self.saved_in_step.append(self.inside)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2], ids=["USR1", "USR2"])
def test_requeue(signum: int, tmp_path: Path, slurm: Any) -> None:
    """Saved at the end of the batch, not in it; the job goes on until SIGTERM, then from there."""
    folder = tmp_path / "runs"
    before = signal.getsignal(signum)
    plugins = [SLURMEnvironment(auto_requeue=True, requeue_signal=signum)]
    straight = fit(tmp_path / "straight")
    watch = InStep()
    asks = Signal(signum, 5, "on_before_optimizer_step")
    kills = Signal(signal.SIGTERM, 9)
    assert interrupted(folder, watch, asks, kills, plugins=plugins) == 143
    assert slurm() == ["requeue 7"]
    assert watch.saved_in_step == [False]
    path = folder / "hpc_ckpt_1.ckpt"
    assert steps(path) == 6
    keys = torch.load(path, weights_only=True)["state_dict"]
    assert all(".adapters." in key for key in keys)
    # Under SLURM Lightning finds it by itself.
    assert_same_state(fit(folder, plugins=plugins), straight)
    assert signal.getsignal(signum) is before


def test_negative_control_lightning_alone_saves_within_the_step(
    tmp_path: Path, slurm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Preemption, "watch", lambda *_: None)
    watch = InStep()
    asks = Signal(signal.SIGUSR1, 5, "on_before_optimizer_step")
    fit(tmp_path / "runs", watch, asks, plugins=[SLURMEnvironment(auto_requeue=True)])
    assert watch.saved_in_step == [True]


# -- several processes -----------------------------------------------------------------------------


def on_rank(folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Exit code of a process of two, of which only rank 1 gets the signal; adapters straight on,
    and of the run that was resumed."""
    code = None
    adapters = []
    for place, signalled, ckpt_path in (
        (folder / "straight", False, None), (folder, True, None), (folder, False, "last"),
    ):  # fmt: skip
        seed_everything(7, verbose=False)
        module = Net()
        own = [Signal(signal.SIGTERM, 5)] if signalled and os.environ["RANK"] == "1" else []
        saver = ModelCheckpoint(place, save_last=True)
        trainer = make_trainer(
            place, lora(), saver, *own, max_epochs=EPOCHS, devices=2, strategy="ddp"
        )
        try:
            trainer.fit(module, Data(8), ckpt_path=ckpt_path)
        except SIGTERMException as error:
            assert signalled
            code = error.code
        else:
            adapters.append({k: v for k, v in module.state_dict().items() if ".adapters." in k})
    return code, adapters


@pytest.mark.slow
def test_all_ranks_agree(tmp_path: Path) -> None:
    results = on_processes(2, on_rank, tmp_path)
    for code, (straight, resumed) in results:
        assert code == 143
        assert_same_state(straight, resumed)


SCRIPT = """
import sys
from pathlib import Path
from tests.training.test_preemption import *

folder = Path(sys.argv[1])
own = [Signal(signal.SIGTERM, 2)] if os.environ.get("LOCAL_RANK", "0") == "0" else []
saver = ModelCheckpoint(folder, save_last=True)
make_trainer(folder, lora(), saver, *own, max_epochs=2, devices=2, strategy="ddp").fit(Net(), Data(8))
"""


@pytest.mark.slow
def test_a_script_that_starts_its_own_processes(tmp_path: Path) -> None:
    """Lightning kills (SIGKILL) a script of whose processes one ends with an error."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = child_environment()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 143, done.stdout + done.stderr
    assert done.stdout.count("SIGTERM: saved") == 1
    assert steps(tmp_path / "last.ckpt") == 3


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`lora-lightning fit` in a folder of its own: exit code, and what it prints."""
    saver = {"every_n_train_steps": 1, "save_last": True}
    monkeypatch.chdir(tmp_path)

    def call(directory: str, *arguments: str, callbacks: Any = ()) -> tuple[int, str]:
        entries = [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver},
            *(
                {"class_path": "tests.training.test_preemption.Signal", "init_args": c}
                for c in callbacks
            ),
        ]
        config = {
            "lora": {"r": 2, "lora_dropout": 0.1, "modules_to_save": ["head"]},
            "model": {"class_path": "tests.helpers.lightning_modules.Net"},
            "data": {"class_path": "tests.helpers.lightning_modules.Data"},
            "trainer": {
                "max_epochs": EPOCHS, "accelerator": "cpu", "default_root_dir": directory,
                "enable_progress_bar": False, "callbacks": entries,
            },
        }  # fmt: skip
        Path("my.yaml").write_text(yaml.safe_dump(config))
        typed = ["fit", "--config", "my.yaml", *arguments]
        monkeypatch.setattr(sys, "argv", ["lora-lightning", *typed])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_the_command(signum: int, code: int, command: Any) -> None:
    assert command("straight")[0] == 0
    before = signal.getsignal(signum)
    found, out = command("broken", callbacks=[{"signum": int(signum), "step": 5}])
    signal.signal(signum, before)  # Lightning leaves Ctrl-C without an effect
    assert found == code
    assert "to go on:\n  lora-lightning fit " in out
    assert steps(Path("broken/checkpoints/last.ckpt")) == (6 if signum == signal.SIGTERM else 5)
    assert command("broken", "--ckpt_path", "last")[0] == 0
    states = [
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("straight", "broken")
    ]
    assert_same_state(*states)


def test_the_command_without_a_checkpoint_names_none(command: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    code, out = command("broken", callbacks=[{"signum": int(signal.SIGINT), "step": 0}])
    signal.signal(signal.SIGINT, before)
    assert code == 130
    assert "interrupted before the first checkpoint" in out
    assert "--ckpt_path" not in out
