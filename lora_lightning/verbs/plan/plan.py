"""`plan`: the memory, steps and files of a run, before any weight is loaded."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn

from lora_lightning.checkpoint.state_dict import adapter_state_dict
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.errors import ConfigError, nearest_hint
from lora_lightning.layers.quantized.bitsandbytes import is_linear4bit
from lora_lightning.tasks.classification import Classification
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.summary import start_table
from lora_lightning.verbs.plan.batch import BatchShape, shape_of
from lora_lightning.verbs.plan.changes import Change, changes_of
from lora_lightning.verbs.plan.estimate import Estimate, Run
from lora_lightning.verbs.plan.placement import bytes_of, memory_at_hand
from lora_lightning.verbs.plan.result import Plan
from lora_lightning.verbs.plan.run_length import optimizer_steps, read_length
from lora_lightning.verbs.plan.subject import Subject

# How many devices are shown where one is asked for.
DEVICES = 8
# Of the Trainer, with its defaults.
TRAINER_OPTIONS: dict[str, Any] = {
    "precision": "32-true",
    "accelerator": "auto",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "accumulate_grad_batches": 1,
    "max_epochs": None,
    "max_steps": -1,
    "limit_train_batches": None,
}
_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Torch warns where tensors without memory are copied, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", ".*self.trainer.*reference is not registered")
        yield


@_without_warnings()
def plan(
    module: LightningModule,
    callbacks: Callback | Sequence[Callback] = (),
    data: LightningDataModule | None = None,
    *,
    batch_size: int | None = None,
    length: int | None = None,
    target_length: int | None = None,
    memory: str | int | None = None,
    **trainer_options: Any,
) -> Plan:
    """Tell what a run needs, before any weight is loaded.

    Tensors have no memory: of a task, the network is built from its config file alone. One step is
    followed, operation by operation, and what lives is counted.

    Args:
        module: The LightningModule, as it would be given to `Trainer.fit`.
        callbacks: Its `LoraCallback`, or several; others are passed over.
        data: Its data module. What can be read of it says how long rows are, and the run.
        batch_size: Rows on each device. Default: the data's.
        length: Tokens of a row. Default: of the longest in the data; else what they may have.
        target_length: Tokens of an encoder-decoder's targets. Default: likewise.
        memory: Of a device, such as `24GB`. Default: what is at hand.
        **trainer_options: Of the Trainer: `precision`, `accelerator`, `devices`, `num_nodes`,
            `strategy`, `accumulate_grad_batches`, `max_epochs`, `max_steps`, `limit_train_batches`.

    Returns:
        A `Plan`, whose `show()` prints it.

    Raises:
        ConfigError: If an option is unknown or cannot be had.
        ModelError: If there is no config file of the network.

    Example:
        >>> plan(module, LoraCallback(r=16), memory="24GB", precision="bf16-true")  # doctest: +SKIP

    """
    options = _checked(trainer_options)
    listed = [callbacks] if isinstance(callbacks, Callback) else [*callbacks]
    ours = [c for c in listed if isinstance(c, AdapterCallback) and c.enabled]
    there = memory_at_hand(memory)
    run = Run(_with_classes(module, data), ours, options["precision"], _kind(options, memory))
    subject = run.subject()
    run.found = read_length(data, subject.module)
    asked = {"batch_size": batch_size, "length": length, "target_length": target_length}
    shape = shape_of(subject.module, data, asked, run.found)
    estimate = run.estimate(subject, shape)
    devices, strategy = _spread(options)
    placed = estimate.placed(devices)
    if strategy not in placed:
        raise ConfigError(
            "quantized weights are packed into integers, which FSDP cannot share out. Each process "
            "holds all of them with strategy='ddp'. (trainer.strategy)"
        )
    changes = [] if estimate.unknown else _changes(run, estimate, shape, options, there[0])
    return _result(run, estimate, shape, options, there, changes)


def _changes(
    run: Run, estimate: Estimate, shape: BatchShape, options: dict[str, Any], memory: int
) -> list[Change]:
    devices, strategy = _spread(options)
    placed = estimate.placed(devices)

    def peak_of(done: Estimate) -> float:  # quantized weights cannot be shared out
        return float(p.peak) if (p := done.placed(devices).get(strategy)) else math.inf

    changes = changes_of(run, shape, estimate, peak_of, lambda peak: peak <= memory)
    changes = [change for change in changes if change.peak != math.inf]
    sharded = placed.get("fsdp2")
    if placed[strategy].peak > memory and sharded is not None and strategy != "fsdp2":
        changes.append(Change(f"{sharded.name} devices", sharded.peak))
    return changes


def _result(
    run: Run,
    estimate: Estimate,
    shape: BatchShape,
    options: dict[str, Any],
    memory: tuple[int, str],
    changes: list[Change],
) -> Plan:
    subject, resident = estimate.subject, estimate.resident
    module = subject.module
    devices, strategy = _spread(options)
    placed = estimate.placed(devices)
    kept = estimate.moments.get("kept", Counter())
    head = estimate.moments.get("head", Counter())
    with subject.fake:
        state = _saved(subject)
    batches = run.found.batches
    if run.found.rows is not None:
        processes = 1 if strategy == "one" else devices
        batches = math.ceil(math.ceil(run.found.rows / processes) / shape.rows)
    steps = optimizer_steps(batches, options)
    notes = list(dict.fromkeys(subject.notes))
    if run.found.reason:
        notes.append(f"the data are not read: {run.found.reason}")
    name = getattr(module, "model_name", "")
    title = f"{type(module).__name__}{f' of {name}' if name else ''}: {shape}, {run.precision}"
    return Plan(
        title=title,
        parameters=_parameters(module),
        trainable=sum(p.numel() for p in subject.trainable()),
        base_bytes=resident["base"],
        adapter_bytes=resident["adapters"],
        gradient_bytes=resident["gradients"],
        optimizer_bytes=resident["optimizer"],
        activation_bytes=None if estimate.unknown else kept["activations"],
        loss_head_bytes=head["loss head"],
        unknown=estimate.unknown,
        adapter_file_bytes=state,
        checkpoint_bytes=state + sum(estimate.state),
        steps=steps,
        tokens=_tokens(run, steps, batches, options),
        placements=tuple(placed.values()),
        placement=placed[strategy],
        memory_bytes=memory[0],
        memory_name=memory[1],
        changes=tuple(changes),
        notes=tuple(notes),
        targets=tuple(
            start_table(root, name, subject.selections.get(name, Selection()))
            for name, root in subject.roots.items()
        ),
    )


def _parameters(module: nn.Module) -> int:
    """How many weights there are, also of layers that pack two to a byte."""
    layers: list[Any] = [m for m in module.modules() if is_linear4bit(m)]
    packed: dict[int, int] = {id(m.weight): m.in_features * m.out_features for m in layers}
    return sum(packed.get(id(p), p.numel()) for p in module.parameters())


def _saved(subject: Subject) -> int:
    """Bytes of what a checkpoint has of the module."""
    if not subject.roots:
        return bytes_of(subject.module.state_dict().values())
    states = [adapter_state_dict(root, name) for name, root in subject.roots.items()]
    return sum(bytes_of(state.values()) for state in states)


def _tokens(
    run: Run, steps: int | None, batches: int | None, options: dict[str, Any]
) -> int | None:
    """Tokens of all steps, as many in each."""
    if steps is None or not batches or run.found.tokens is None:
        return None
    windows = math.ceil(batches / (options["accumulate_grad_batches"] or 1))
    return round(run.found.tokens * steps / windows)


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in TRAINER_OPTIONS:
            raise ConfigError(
                f"plan knows no option {name!r}.{nearest_hint(name, TRAINER_OPTIONS)} Of the "
                f"Trainer's it takes {', '.join(TRAINER_OPTIONS)}. ({name})"
            )
    options = {**TRAINER_OPTIONS, **given}
    precision = str(options["precision"] or "32-true")
    options["precision"] = _PRECISIONS.get(precision, precision)
    return options


def _spread(options: dict[str, Any]) -> tuple[int, str]:
    """How many devices are shown, and which strategy is asked for."""
    given = options["devices"]
    count = given if isinstance(given, int) else len(given) if isinstance(given, list) else 1
    if isinstance(given, str) and given.isdigit():
        count = int(given)
    asked = count * (options["num_nodes"] or 1)
    strategy = options["strategy"]
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    sharded = "fsdp" in name.lower() or "ModelParallel" in name
    if asked <= 1 and not sharded:
        return DEVICES, "one"
    return (asked if asked > 1 else DEVICES), "fsdp2" if sharded else "ddp"


def _kind(options: dict[str, Any], memory: str | int | None) -> str:
    """The kind of device that is planned for: `--memory` alone means that of a GPU."""
    accelerator = options["accelerator"]
    if accelerator not in ("auto", None):
        return str(accelerator)
    return "cuda" if memory is not None or torch.cuda.is_available() else "cpu"


def _with_classes(module: LightningModule, data: Any) -> LightningModule:
    """A classification task that knows the classes of its data, as the Trainer would tell it."""
    if not isinstance(module, Classification) or module.label_names:
        return module
    names = getattr(data, "label_names", None)
    module = copy.copy(module)
    module.label_names = names
    return module
