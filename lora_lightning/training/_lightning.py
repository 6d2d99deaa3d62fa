"""The private names of Lightning: all that this package uses, one accessor each.

No other file of the package touches one. Every accessor says what it is for and the version of
Lightning that its names are in since; "1.5" stands for 1.5 or before.
`tests/training/test_lightning_private_names.py` has a test for each, which fails when Lightning
changes. Objects of the `pytorch_lightning` package have the same names.
"""

from __future__ import annotations

import builtins
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import fields
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_lightning.utilities.is_a import is_a

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
    from lightning.pytorch.loops.loop import _Loop as Loop
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as TrainingEpochLoop
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO
    from lightning.pytorch.strategies import Strategy
    from lightning.pytorch.strategies.launchers.launcher import _Launcher as Launcher
    from lightning.pytorch.trainer.connectors.logger_connector.result import (
        _ResultMetric as ResultMetric,
    )
    from torchmetrics import Metric

SignalHandler = Callable[[int, FrameType | None], Any]
Loops = dict[str, dict[str, Any]]  # checkpoint["loops"]["fit_loop"]

# Methods of strategies that are overridden on the instance.
SETUP_MODEL = "_setup_model"  # FSDPStrategy: since 2.0, DeepSpeedStrategy: since 2.2
SETUP_MODEL_AND_OPTIMIZER = "_setup_model_and_optimizer"  # DeepSpeedStrategy: since 1.6

# Where the wrapper of a sampler for several processes keeps the user's. Since 1.5.
WRAPPED_SAMPLER = "_sampler"


# -- modules and callbacks -------------------------------------------------------------------------


def trainer_of(module: object) -> Trainer | None:
    """The module's Trainer; `module.trainer` raises where there is none. Since 1.7."""
    return getattr(module, "_trainer", None)


def state_key(callback: Callback, **parts: object) -> str:
    """A key for a callback's state as Lightning's own callbacks form it. Since 1.7."""
    return callback._generate_state_key(**parts)


def averaged_model(callback: Callback) -> nn.Module | None:
    """The averaged copy that `WeightAveraging` keeps during fit. Since 2.6."""
    return getattr(callback, "_average_model", None)


def all_callbacks(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks: public, but of no type that its class would say. Since 1.5."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


# -- loops -----------------------------------------------------------------------------------------


def data_fetcher(trainer: Trainer) -> DataFetcher | None:
    """The fetcher of training batches; None before data were asked for. Since 1.6."""
    return trainer.fit_loop._data_fetcher


def fetched_ahead(fetcher: DataFetcher) -> list[Any]:
    """The batches that were fetched before they were asked for. Since 2.0."""
    return getattr(fetcher, "batches", [])


def train_iterators(trainer: Trainer) -> list[Iterator[Any]]:
    """The iterators over the training data loaders that are at work. Since 2.0."""
    combined = trainer.fit_loop._combined_loader
    return list(getattr(getattr(combined, "_iterator", None), "iterators", ()))


def take_loader_states(trainer: Trainer) -> list[dict[str, Any]]:
    """Take the loaders' states that were read from a checkpoint and not used yet. Since 2.2."""
    states = trainer.fit_loop._combined_loader_states_to_load
    trainer.fit_loop._combined_loader_states_to_load = []
    return states


def load_loader_states(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Have the training data loaders go on from `states`. Since 2.2."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    combined._load_state_dicts(states)


def train_data(trainer: Trainer) -> Any:
    """Ask the module or data module, whoever has it, for a training data loader. Since 2.0."""
    return trainer.fit_loop._data_source.dataloader()


def given_validation_data(trainer: Trainer) -> Any:
    """The validation data that fit was given itself; None where a module has them. Since 2.0."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return None if source.is_module() else source.instance


def accumulates(trainer: Trainer) -> bool:
    """True if no optimizer step is made at the end of this training batch. Since 1.5."""
    return trainer.fit_loop._should_accumulate()


def is_last_batch(trainer: Trainer) -> bool:
    """True if no other training batch follows in this epoch. Since 1.5."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def validates_after_batch(trainer: Trainer) -> bool:
    """True if a validation follows this training batch. Since 2.1."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def stop_restarting(loop: Loop) -> None:
    """Have a restored loop, but not those inside it, run as if it had not been. Since 1.6.

    The setter of `restarting` changes inner loops, and under max_steps does not take False.
    """
    loop._restarting = False


def logged_results(of: Trainer | TrainingEpochLoop) -> Mapping[str, ResultMetric]:
    """Results logged in the epoch under way, of a loop or a Trainer's active loop. Since 1.5."""
    return of._results or {}


def saved_results(loop: TrainingEpochLoop) -> list[dict[str, Any]]:
    """What a loop's logged results hold, in plain values. Since 1.9.

    `options` is None for those that a process group averages, which cannot be saved.
    """
    return [
        {
            "key": key,
            "name": result.meta.name,
            "options": None if result.meta.sync.group is not None else result_options(result),
            "tensors": result.metric_state,
            "last": result._forward_cache,
        }
        for key, result in loop._results.items()
        if not result.has_reset
    ]


def result_options(result: ResultMetric) -> dict[str, Any]:
    """The options that a result was logged with, in plain values. Since 1.9."""
    meta = result.meta
    plain = {option.name for option in fields(meta)} - {"reduce_fx", "_sync"}
    return {
        "plain": {name: getattr(meta, name) for name in plain},
        # As it was given: `max` is not `torch.max`, and other options are an error.
        "reduce_fx": (meta.reduce_fx in (min, max, sum), meta.reduce_fx.__name__),
        "sync_dist": meta.sync.should,
        "rank_zero_only": meta.sync.rank_zero_only,
    }


def restore_results(module: LightningModule, saved: list[dict[str, Any]]) -> None:
    """Give the training loop what `saved_results` held, as in the middle of an epoch. Since 1.9."""
    trainer = module.trainer
    results = trainer.fit_loop.epoch_loop._results
    classes: Any = sys.modules[type(results).__module__]
    metrics = dict(module.named_modules())
    for entry in saved:
        options = entry["options"]
        builtin, name = options["reduce_fx"]
        meta = classes._Metadata(
            **options["plain"], reduce_fx=getattr(builtins if builtin else torch, name)
        )
        meta.sync = classes._Sync(
            trainer.strategy.reduce, options["sync_dist"], options["rank_zero_only"]
        )
        result = classes._ResultMetric(meta, is_tensor=bool(entry["tensors"]))
        if not result.is_tensor:
            metric = metrics.get(meta.metric_attribute)
            if metric is None:
                continue
            result.value = metric
        restore_metric(result, 1, entry["tensors"])
        result._forward_cache = entry["last"]
        results[entry["key"]] = result
    if saved:
        trainer._logger_connector._first_loop_iter = True  # the batch that follows is not the first


def restore_metric(metric: Metric, updates: int, state: dict[str, Any]) -> None:
    """Have a metric go on from a state after so many updates. Since torchmetrics 0.2."""
    for name, value in state.items():
        setattr(metric, name, value)
    metric._update_count, metric._computed = updates, None


def last_value(result: ResultMetric) -> Any:
    """The value that was logged of the last batch. Since 1.5."""
    return result._forward_cache


def logs_this_batch(trainer: Trainer) -> bool:
    """True if loggers are told of this training batch (log_every_n_steps). Since 1.5."""
    return trainer._logger_connector.should_update_logs


def logged_step(trainer: Trainer) -> int:
    """The step that loggers are told, which counts no optimizers. Since 1.6."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


# -- what a checkpoint says of the loops -----------------------------------------------------------


def saved_batch_progress(loops: Loops) -> dict[str, Any]:
    """The progress in training batches. Since 1.6."""
    return loops["epoch_loop.batch_progress"]


def saved_validation_progress(loops: Loops) -> dict[str, Any]:
    """The progress in batches of the validation within fit. Since 1.6."""
    return loops["epoch_loop.val_loop.batch_progress"]


def count_logged_step(loops: Loops) -> None:
    """Count a step more for loggers. Since 1.7."""
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def take_saved_loader_states(loops: Loops) -> list[dict[str, Any]]:
    """Take out the states of the data loaders that have one. Since 2.2."""
    states: list[dict[str, Any]] = loops["state_dict"].pop("combined_loader", [])
    return states


def save_loader_states(loops: Loops, states: list[dict[str, Any]]) -> None:
    """Put the states of data loaders where Lightning looks for them. Since 2.2."""
    loops["state_dict"]["combined_loader"] = states


# -- signals and processes -------------------------------------------------------------------------


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """The environment of the processes, which strategies for one device do not know. Since 1.5."""
    return trainer._accelerator_connector.cluster_environment


def lightnings_signal_handlers(
    trainer: Trainer, signum: int
) -> tuple[list[SignalHandler], list[SignalHandler]]:
    """The Trainer's own handlers of a signal, and those that it calls beside them. Since 2.0.

    Both are empty where the user's handler stands alone, which Lightning leaves there.
    """
    handlers = getattr(signal.getsignal(signum), "signal_handlers", [])
    connector = trainer._signal_connector
    own = [handler for handler in handlers if getattr(handler, "__self__", None) is connector]
    return own, [handler for handler in handlers if handler not in own and callable(handler)]


def save_and_requeue(trainer: Trainer, signum: int | None) -> None:
    """Do what Lightning does at SLURM's signal: save, and have the job requeued. Since 2.0."""
    trainer._signal_connector._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]


def starts_processes(launcher: Launcher | None) -> bool:
    """True if Python starts the processes of each call: spawn, fork, notebook. Since 2.0."""
    return is_a(launcher, "_MultiProcessingLauncher")


# -- checkpoints -----------------------------------------------------------------------------------


def save_last_checkpoint(saver: ModelCheckpoint, trainer: Trainer) -> None:
    """Have a ModelCheckpoint write its last.ckpt now. Since 1.6."""
    saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))


def has_saved(saver: ModelCheckpoint) -> bool:
    """True if a ModelCheckpoint has written a checkpoint in this run. Since 2.1."""
    return bool(saver._last_checkpoint_saved)


def override_link(saver: Callback, link: Callable[[Trainer, str, str], None]) -> None:
    """Have a ModelCheckpoint link last.ckpt by `link(trainer, filepath, linkpath)`. Since 2.1."""
    saver._link_checkpoint = link  # type: ignore[attr-defined]


def works_in_background(plugin: object) -> bool:
    """True for AsyncCheckpointIO, which saves in a thread of its own. Since 1.7."""
    return hasattr(plugin, "_executor")


def background_executor(plugin: object) -> Executor | None:
    """The thread of AsyncCheckpointIO, which does one piece of work after the other. Since 1.7."""
    return getattr(plugin, "_executor", None)


def fail_in_background(plugin: AsyncCheckpointIO, error: Exception) -> None:
    """Have AsyncCheckpointIO raise `error` at its next save, or at the end. Since 1.7."""
    plugin._error = error


def replace_wrapped(wrapper: WrappingCheckpointIO, plugin: CheckpointIO) -> None:
    """Exchange what a CheckpointIO wraps; its setter takes the first one only. Since 1.7."""
    wrapper._checkpoint_io = plugin


# -- strategies and precision ----------------------------------------------------------------------


def setup_model(strategy: Strategy, model: nn.Module) -> nn.Module:
    """Wrap the model as the class of this FSDP or DeepSpeed strategy does. Since 2.2."""
    wrapped: nn.Module = getattr(type(strategy), SETUP_MODEL)(strategy, model)
    return wrapped


def setup_model_and_optimizer(
    strategy: Strategy, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: object
) -> tuple[Any, Any]:
    """Make the engine and its optimizer as the class of this DeepSpeed strategy does. Since 1.6."""
    setup = getattr(type(strategy), SETUP_MODEL_AND_OPTIMIZER)
    engine, optimizer = setup(strategy, model, optimizer, lr_scheduler)
    return engine, optimizer


def collective_timeout(strategy: Strategy) -> timedelta | None:
    """How long a strategy of several processes lets one wait for the others. Since 1.8."""
    return getattr(strategy, "_timeout", None)


def writes_folders(strategy: Strategy) -> bool:
    """True if this FSDP (since 2.1) or ModelParallel strategy (since 2.3) writes sharded files."""
    if is_a(strategy, "FSDPStrategy"):
        return bool(strategy._state_dict_type == "sharded")  # type: ignore[attr-defined]
    return bool(strategy._save_distributed_checkpoint)  # type: ignore[attr-defined]


def has_completed_config(strategy: Strategy) -> bool:
    """True once DeepSpeedStrategy has written options of its own into its config. Since 1.6."""
    return getattr(strategy, "_config_initialized", False)


def call_inside_wrapper(strategy: Strategy, module: LightningModule, method: str) -> Any:
    """Call a method of the module by way of its wrapper's forward (FSDP's, DDP's). Since 2.1."""
    assert strategy.model is not None
    return strategy._forward_redirection(strategy.model, module, method)


def is_quantizing_hook(hook: object) -> bool:
    """True for the hook of BitsandbytesPrecision that quantises a loaded weight. Since 2.1."""
    return isinstance(hook, partial) and hook.func.__name__ == "_quantize_on_load_hook"
