"""A checkpoint evaluated in a process that knows nothing of the run that wrote it."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from pathlib import Path
from typing import Any

import torch

from lora_lightning.examination.recipe import BASE_SEED, Recipe, Run, quiet
from lora_lightning.training.checkpoint_io.loading import load_from_checkpoint
from lora_lightning.utilities.rng import seed_all

PATIENCE = 600.0  # seconds

Evaluations = dict[str, dict[str, Any]]


class CannotBeSent(Exception):
    """A recipe that no other process can be given; the message says why."""


def evaluated_in_fresh_process(recipe: Recipe, checkpoint: Path, stages: list[str]) -> Evaluations:
    """What each stage gives by `ckpt_path` in another process.

    Raises:
        CannotBeSent: If the recipe cannot be pickled.
        RuntimeError: If the process fails.

    """
    try:
        sent = pickle.dumps(recipe)
    except Exception as error:  # whatever pickle's helpers raise
        raise CannotBeSent(
            f"cannot be sent to another process: {error}. Define make_module and make_data by name "
            "at the top of a module: functions within functions and lambdas cannot be pickled"
        ) from error
    kinds = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    if "forkserver" in kinds:  # has imported torch once for all
        context.set_forkserver_preload([__name__])
    answer = recipe.folder / "of_another_process.pt"
    process = context.Process(target=_answer, args=(sent, checkpoint, stages, answer))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        raise RuntimeError(f"the process did not end within {PATIENCE:.0f} seconds")
    if not answer.exists():
        raise RuntimeError(
            f"the process ended with exit code {process.exitcode} before it began; a script "
            'that is run by its name needs `if __name__ == "__main__":`'
        )
    found: Evaluations | str = torch.load(answer, weights_only=False)  # our own, of this moment
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def evaluated_by_path(recipe: Recipe, checkpoint: Path, stages: list[str]) -> Evaluations:
    """What each stage gives for a fresh module by `ckpt_path`."""
    found = {}
    for stage in stages:
        run = Run(recipe.trainer(), recipe.module())
        found[stage] = recipe.evaluate(run, stage, checkpoint)
    return found


def loaded_run(recipe: Recipe, checkpoint: Path) -> Run:
    """The module that `load_from_checkpoint` makes, and a Trainer without LoraCallback."""
    kind = type(recipe.module())
    seed_all(BASE_SEED)
    module = load_from_checkpoint(kind, checkpoint)
    return Run(recipe.trainer(adapted=False), module)


def _answer(sent: bytes, checkpoint: Path, stages: list[str], answer: Path) -> None:
    try:
        with quiet():
            found: Any = evaluated_by_path(pickle.loads(sent), checkpoint, stages)
    except BaseException as error:
        found = traceback.format_exception_only(error)[-1].strip()
    torch.save(found, answer)
