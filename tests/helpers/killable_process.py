"""A training run in a process of its own that a test may kill at any moment, and start again.

Importing torch and Lightning takes seconds; so one server imports them once and forks every process
off itself, in a tenth of a second (`multiprocessing`'s fork server).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_lightning.callback import LoraCallback
from lora_lightning.cli.main import main
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.paths import child_environment


class KillableProcess:
    """A process that runs `function(*args)`.

    Args:
        log: What it prints goes there.

    """

    def __init__(self, function: Callable[..., None], *args: Any, log: Path) -> None:
        self.process = _context().Process(target=_run, args=(log, function, args))
        self.process.start()
        self.log = log

    def end(self, after: float | None = None) -> int:
        """Its exit code; killed (SIGKILL) `after` so many seconds, unless it ends before."""
        self.process.join(timeout=300 if after is None else after)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            assert after is not None, f"no end:\n{self.log.read_text()}"
        return int(self.process.exitcode or 0)


def fit(folder: Path, epochs: int, saver: dict[str, Any], options: dict[str, Any]) -> None:
    """Train to the end, from the last checkpoint on, and leave `done.pt`."""
    seed_everything(7, verbose=False)
    module = Net()
    lora = LoraCallback(
        r=2, lora_dropout=0.2, target_modules=["embed", "body.2"], modules_to_save=["head"]
    )
    callbacks = [ModelCheckpoint(folder / "checkpoints", **saver)] if saver else []
    trainer = make_trainer(folder, lora, *callbacks, max_epochs=epochs, **options)
    trainer.fit(module, Data(), ckpt_path="last")
    state = {k: v for k, v in module.state_dict().items() if ".adapters." in k}
    torch.save(state, folder / "done.tmp")
    os.replace(folder / "done.tmp", folder / "done.pt")


def command(folder: Path, *arguments: str) -> None:
    """`lora-lightning` with these arguments, in `folder`."""
    os.chdir(folder)
    sys.argv = ["lora-lightning", *arguments]
    main()


def _run(log: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    function(*args)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = child_environment()["PYTHONPATH"]
    context.set_forkserver_preload(["tests.helpers.killable_process"])
    return context
