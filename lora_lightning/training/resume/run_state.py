"""State of each process in a checkpoint, beside what Lightning writes, for an exact resume.

Each process has random numbers, a position in its data and, between two optimizer steps of
accumulated gradients, gradients of its own; Lightning writes none of them. All processes take part
in saving, so they are gathered, and each takes its own back. Once training has ended rank 0 may
save alone: they are gathered right then.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.training import _lightning
from lora_lightning.training.collectives import gathered, is_over
from lora_lightning.training.frozen_base import trained_parameters, waiting_parameters
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.module_state import module_state
from lora_lightning.training.resume.checks import check_no_search, searching, warn_of_changed_rates
from lora_lightning.training.resume.loop_state import (
    complete_loops,
    continue_loops,
    in_epoch,
    monitored,
)
from lora_lightning.training.resume.metrics import continue_metrics, metrics_so_far
from lora_lightning.training.resume.resumable_loader import (
    Pass,
    ResumableLoader,
    generator_states,
    set_generator_states,
    warn_of_workers,
)
from lora_lightning.utilities.dtensor import local_part, part_like
from lora_lightning.utilities.rng import random_state, seed_all, set_random_state


def add_run_state(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Write the state of every process into the checkpoint; within a run all must call it."""
    trainer, loops = module.trainer, checkpoint["loops"]["fit_loop"]
    own = _own_state(module, loops)
    if is_over(trainer):  # rank 0 may save alone, of what was gathered at the end
        checkpoint[KEY]["processes"] = module_state(module).final_states or [own]
    else:
        checkpoint[KEY]["processes"] = gathered(trainer.strategy, own)
    checkpoint[KEY]["waiting"] = waiting_parameters(module)
    checkpoint[KEY]["metrics"] = monitored(trainer)
    checkpoint[KEY]["learning_rates"] = module_state(module).learning_rates
    complete_loops(loops, trainer)


def remember_final_states(module: LightningModule) -> None:
    """Gather the states of all processes when training ends, for checkpoints from then on."""
    trainer = module.trainer
    if trainer.world_size > 1 and not module_state(module).final_states:
        own = _own_state(module, trainer.fit_loop.state_dict())
        module_state(module).final_states = gathered(trainer.strategy, own)


def _own_state(module: LightningModule, loops: dict[str, Any]) -> dict[str, Any]:
    trainer = module.trainer
    return {
        "random_state": random_state(cuda="all" if trainer.world_size == 1 else "own"),
        "generators": [generator_states(loader) for loader in _stateless_loaders(trainer)],
        "positions": _positions(trainer, loops),
        "gradients": _gradients(module),
        "metrics": metrics_so_far(module),
    }


def prepare_run_state(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Keep this process's state until training starts; Lightning restores the rest before."""
    processes = checkpoint.get(KEY, {}).get("processes")
    trainer = module.trainer
    if processes is None or trainer.state.fn != "fit":
        return
    rank, before, now = trainer.global_rank, len(processes), trainer.world_size
    own = {**processes[rank % before], "monitored": checkpoint[KEY]["metrics"]}
    own["learning_rates"] = checkpoint[KEY].get("learning_rates")  # older checkpoints: none
    own["waiting"] = checkpoint[KEY].get("waiting", [])  # likewise
    if before != now:
        lost = "".join(
            f"; {what} so far are lost"
            for what, there in (
                ("gradients accumulated", own["gradients"]),
                ("averages of metrics", own.get("metrics", {}).get("logged")),
            )
            if there
        )
        rank_zero_warn(
            f"The checkpoint was written by {before} processes, and {now} go on: random numbers "
            "(and, in the middle of an epoch, the order of the data) are not those of the "
            f"uninterrupted run{lost}. Use as many processes for an exact resume. (trainer.devices)"
        )
        own["gradients"] = {}
        own.pop("metrics", None)
        own["rank_seed"] = rank if rank >= before else None
    _lightning.save_loader_states(checkpoint["loops"]["fit_loop"], own["positions"])
    # Not where a tuner takes back what it has trained: it keeps the random state itself.
    if _lightning.data_fetcher(trainer) is None:
        check_no_search(trainer)
        _wait_for_start(module, own)
    elif trainer.strategy.restore_checkpoint_after_setup and not searching(trainer):
        # `configure_optimizers` came before, and may have asked for the length of the data.
        _wait_for_start(module, own)


def _wait_for_start(module: LightningModule, own: dict[str, Any]) -> None:
    """Keep `own`; no sanity check meanwhile: what validation moves of the module is loaded."""
    own["sanity_steps"] = module.trainer.num_sanity_val_steps
    module.trainer.num_sanity_val_steps = 0
    module_state(module).resumed_from = own


def end_wait(module: LightningModule) -> dict[str, Any] | None:
    """What `_wait_for_start` has kept."""
    own, module_state(module).resumed_from = module_state(module).resumed_from, None
    if own is not None:
        module.trainer.num_sanity_val_steps = own["sanity_steps"]
    return own


def continue_run(module: LightningModule) -> None:
    """Go on where the checkpoint left off; the last thing before batches are asked for."""
    own, trainer = end_wait(module), module.trainer
    if own is not None:
        rates = module_state(module).learning_rates
        warn_of_changed_rates(own["learning_rates"], rates)
        module_state(module).learning_rates = own["learning_rates"] or rates  # what it goes on from
        continue_loops(trainer, own["monitored"])
        _continue(module, own)
        fetcher = _lightning.data_fetcher(trainer)
        if fetcher is not None and _lightning.fetched_ahead(fetcher) and not in_epoch(trainer):
            iter(fetcher)  # it fetched a batch before random states were restored


def _continue(module: LightningModule, own: dict[str, Any]) -> None:
    trainer = module.trainer
    if trainer.current_epoch or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        for loader in _loaders(trainer):
            warn_of_workers(loader)
    fetcher, states = _lightning.data_fetcher(trainer), _lightning.take_loader_states(trainer)
    if not in_epoch(trainer) or (fetcher is not None and fetcher.done):
        _begin_epoch(trainer, own["positions"])
    elif states and fetcher is not None:
        # Asked for `estimated_stepping_batches`, as schedules are made with, Lightning begins an
        # epoch before the checkpoint is restored, and would stay at its head.
        _lightning.load_loader_states(trainer, states)
        iter(fetcher)
    for loader, saved in zip(_stateless_loaders(trainer), own["generators"], strict=False):
        set_generator_states(loader, saved)
    if "metrics" in own:  # not in older checkpoints
        continue_metrics(module, own["metrics"])
    parameters = dict(named_parameters(module))
    for name, gradient in own["gradients"].items():
        parameter = parameters[name]
        parameter.grad = part_like(gradient.to(parameter.device, copy=True), parameter)
    for name in own["waiting"]:
        parameters[name].requires_grad_(False)
    set_random_state(own["random_state"])
    if own.get("rank_seed") is not None:
        seed_all(int(torch.randint(2**62, ())) + own["rank_seed"])


def _begin_epoch(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Begin an epoch with the next batch: loaders with a state have given the last one."""
    for one_pass in _lightning.train_iterators(trainer):
        if isinstance(one_pass, Pass):
            one_pass.goes_on = False
    for loader, state in zip(_stateful_loaders(trainer), states, strict=False):
        if not isinstance(loader, ResumableLoader):
            loader.load_state_dict(state)
            loader.__dict__.pop("_next_goes_on", None)


def _loaders(trainer: Trainer) -> list[Any]:
    """The training data loaders, which a module may give as any nested containers."""
    loaders = trainer.train_dataloader
    return [] if loaders is None else CombinedLoader(loaders).flattened


def _stateless_loaders(trainer: Trainer) -> list[ResumableLoader]:
    return [loader for loader in _loaders(trainer) if isinstance(loader, ResumableLoader)]


def _stateful_loaders(trainer: Trainer) -> list[Any]:
    """The loaders whose states Lightning saves, ours among them."""
    needed = ("state_dict", "load_state_dict")
    return [loader for loader in _loaders(trainer) if all(hasattr(loader, n) for n in needed)]


def _positions(trainer: Trainer, loops: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of the loaders that have one, in Lightning's order, ours with the position."""
    states = _lightning.take_saved_loader_states(loops)
    if not in_epoch(trainer) or _lightning.is_last_batch(trainer):
        return states  # no other batch in this epoch
    passes = {id(p.loader): p for p in _lightning.train_iterators(trainer) if isinstance(p, Pass)}
    # Batches that were fetched, but will have to be fetched again
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    fetcher = _lightning.data_fetcher(trainer)
    fetched = 0 if fetcher is None else len(_lightning.fetched_ahead(fetcher))
    ahead = fetched + batches.ready - batches.processed
    for index, loader in enumerate(_stateful_loaders(trainer)):
        if id(loader) not in passes:
            continue
        if isinstance(loader, ResumableLoader):
            states[index] = passes[id(loader)].state(ahead)
        elif ahead == 1 and (before := passes[id(loader)].loader_before) is not None:
            states[index] = before
    return states


def _gradients(module: LightningModule) -> dict[str, torch.Tensor]:
    """The gradients accumulated for the next optimizer step, if one is under way."""
    trainer = module.trainer
    if module.automatic_optimization and not _lightning.accumulates(trainer):
        return {}
    return {
        name: local_part(p.grad).detach().cpu().clone()
        for name, p in trained_parameters(module).items()
        if p.grad is not None
    }
