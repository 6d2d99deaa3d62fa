"""`examine`: a few steps of a user's own module, and what of the promises holds for it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lora_lightning.errors import ConfigError
from lora_lightning.examination.promises import PROMISES, in_words
from lora_lightning.examination.recipe import EPOCHS, Recipe, quiet
from lora_lightning.examination.result import Examination, Finding
from lora_lightning.examination.runs import Runs
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.utilities.rng import random_state, set_random_state

_TRAINS = "trains"
# Arguments of a Trainer that would make something else of the runs.
_OWN = {
    "barebones", "callbacks", "default_root_dir", "devices", "enable_checkpointing",
    "enable_progress_bar", "fast_dev_run", "limit_predict_batches", "limit_test_batches",
    "limit_train_batches", "limit_val_batches", "max_epochs", "max_steps", "max_time",
    "min_epochs", "min_steps", "num_nodes", "overfit_batches",
}  # fmt: skip


def examine(
    make_module: Callable[[], LightningModule],
    make_data: Callable[[], Any],
    callback: Callback | Sequence[Callback],
    *,
    batches: int = 4,
    trainer_options: Mapping[str, Any] | None = None,
    show: bool = True,
) -> Examination:
    """Run a few steps of a module with adapters, and tell what holds for it.

        def module():
            return MyModule.load_from_checkpoint("pretrained.ckpt")

        examine(module, MyData, LoraCallback(r=8))

    Examined are: the start as the base; the base, which nothing but the module itself moves;
    gradients; optimizers; checkpoints that hold all that changed and nothing else; exact resume,
    from the end of an epoch and from its middle, under another seed; the same evaluation in
    memory, by `ckpt_path`, in a fresh process and after `load_from_checkpoint`. Everything is
    compared bit for bit, with a run that was neither saved nor interrupted and with a module that
    nothing has touched. It takes about five runs of two epochs, in a folder of its own that is
    removed; random state and module of the caller stay as they are.

    Args:
        make_module: Returns a fresh module each time, with the same weights; random ones are drawn
            from a seed that is set before.
        make_data: Returns fresh data each time: a data module, a DataLoader that serves for all,
            or None where the module has its own.
        callback: The LoraCallback, or several callbacks, as a recipe: copies of it run.
        batches: Batches of an epoch.
        trainer_options: Further arguments of each run's Trainer, such as `precision`. It is one
            process with two epochs.
        show: Print the table.

    Returns:
        What was found, a row for each promise.

    Raises:
        ConfigError: If `callback` is or has no LoraCallback that is enabled, or one that cannot be
            copied, `make_module` or `make_data` is no function, the former returns no module or
            the same one twice, `batches` is no positive number, or `trainer_options` has one that
            an examination sets itself.

    """
    callbacks = tuple(callback) if isinstance(callback, (list, tuple)) else (callback,)
    _check(make_module, make_data, callbacks, batches)
    _check_options(trainer_options or {})
    state = random_state()
    try:
        with tempfile.TemporaryDirectory(prefix="examination-") as folder:
            options = trainer_options or {}
            recipe = Recipe(make_module, make_data, callbacks, Path(folder), batches, options)
            with quiet():
                examination = Examination(tuple(_findings(Runs(recipe))))
    finally:
        set_random_state(state)
    if show:
        examination.show()
    return examination


def _check(
    make_module: object, make_data: object, callbacks: Sequence[object], batches: int
) -> None:
    if not any(isinstance(one, AdapterCallback) and one.enabled for one in callbacks):
        raise ConfigError(
            f"examine is given {[_kind(one) for one in callbacks]} as its callbacks, but no "
            "LoraCallback that is enabled: there would be nothing to examine. (callback)"
        )
    for one in callbacks:
        try:
            copy.deepcopy(one)
        except Exception as error:  # of the user's class
            raise ConfigError(
                f"A {_kind(one)} cannot be copied ({in_words(error)}), and each run of an "
                "examination has callbacks of its own. Leave it out. (callback)"
            ) from error
    if batches < 1:
        raise ConfigError(f"batches is {batches}; an epoch has at least one. (batches)")
    if isinstance(make_module, LightningModule) or not callable(make_module):
        raise ConfigError(
            f"make_module is a {_kind(make_module)}; give a function that returns a fresh "
            "module each time, such as the module's class. (make_module)"
        )
    if not callable(make_data):
        raise ConfigError(
            f"make_data is a {_kind(make_data)}; give a function that returns fresh data each "
            "time, such as the data module's class; or one that returns None where the module "
            "has its own. (make_data)"
        )


def _check_options(options: Mapping[str, Any]) -> None:
    own = [name for name in options if name in _OWN]
    if own:
        raise ConfigError(
            f"trainer_options has {', '.join(own)}, but an examination sets this itself: it is "
            f"{EPOCHS} epochs of a few `batches`, in one process, with checkpoints of its own, and "
            "callbacks are given as `callback`. Leave it out. (trainer_options)"
        )


def _kind(value: object) -> str:
    return type(value).__name__ if not isinstance(value, type) else f"class {value.__name__}"


def _findings(runs: Runs) -> list[Finding]:
    first = runs.recipe.module()
    if runs.recipe.module() is first:
        raise ConfigError(
            "make_module returned the same module twice; each run needs a fresh one. (make_module)"
        )
    try:
        steps = runs.alone.trainer.global_step
    except Exception as error:  # of the user's module, or a refusal of ours
        rest = [Finding(name, None, "it does not train") for name in PROMISES]
        return [Finding(_TRAINS, False, in_words(error)), *rest]
    trains = Finding(_TRAINS, steps > 0, f"{steps} optimizer steps")
    return [trains, *(finding(name, runs) for name in PROMISES)]


def finding(name: str, runs: Runs) -> Finding:
    """Examine one promise."""
    try:
        holds, reason = PROMISES[name](runs)
    except Exception as error:  # anything: what should have gone well did not
        holds, reason = False, in_words(error)
    return Finding(name, holds, reason)
