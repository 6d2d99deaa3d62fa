"""The summary of a run for its user: a table at the start, and where checkpoints lie at the end."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.table import Table
from torch import Tensor, nn

from lora_lightning.adapters.carried import is_carried
from lora_lightning.adapters.modules_to_save import base_tensors_of
from lora_lightning.checkpoint.fingerprint import base_tensors
from lora_lightning.checkpoint.state_dict import adapter_state_dict
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.construction import fitted_ranks
from lora_lightning.engine.followers import carried_tensors
from lora_lightning.engine.injection import adapters_named
from lora_lightning.engine.switching import layers_with
from lora_lightning.engine.targets.hints import shown_name
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.errors import first_few
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.registry import layer_type_for
from lora_lightning.layers.traversal import walk
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.messages import show
from lora_lightning.training.module_state import module_state
from lora_lightning.training.new_modules import new_modules_line
from lora_lightning.training.optimizers import is_left_out, trainable_parameters

LEFT_OUT_ROWS = 8  # at most, of what default targets leave out


@dataclass
class TargetRow:
    """One line of the start table: all modules that share the last part of their path."""

    matched: int = 0  # modules that carry the adapter
    possible: int = 0  # modules of that name that could
    ranks: set[int] = field(default_factory=set)
    parameters: int = 0
    full: bool = False  # True if it trains as a copy (`modules_to_save`), without a rank


def target_rows(model: nn.Module, adapter_name: str) -> list[tuple[str, TargetRow]]:
    """The lines of the start table, adapted modules first, trained copies after them."""
    rows: dict[str, TargetRow] = defaultdict(TargetRow)
    copies: dict[str, TargetRow] = {}
    for path, module in walk(model):
        found = module.adapters.get(adapter_name) if isinstance(module, AdaptedLayer) else None
        adapter = None if found is not None and is_carried(found) else found
        size = sum(p.numel() for p in adapter.parameters()) if adapter is not None else 0
        if isinstance(module, AdaptedLayer) and adapter_name in module.trained_copies():
            copies[path] = TargetRow(1, 1, set(), size, full=True)
        elif adapter is not None or layer_type_for(module) is not None:
            row = rows[shown_name(path)]
            row.possible += 1
            if adapter is not None:
                row.matched += 1
                row.ranks |= _ranks(adapter)
                row.parameters += size
    return [*((name, row) for name, row in rows.items() if row.matched), *copies.items()]


def show_start(callback: AdapterCallback, trainer: Trainer, module: LightningModule) -> None:
    """Print what the callback's adapter trains, on rank 0."""
    if trainer.is_global_zero:
        root, name = callback._root(module), callback.adapter_name
        selection = callback._selection
        notes = [*new_modules_line(callback), *fitted_line(root, name)]
        notes += [*selection.passed_over.lines(), *left_out_lines(root, name)]
        notes += untied_lines(root, name)
        show(start_table(root, name, selection), *notes, *start_lines(module, root, name))


def show_without_adapters(trainer: Trainer, module: LightningModule) -> None:
    """Print what trains where `enabled` is False, on rank 0."""
    if trainer.is_global_zero:
        show(f"no adapters (lora.enabled): {trainable_line(module)}")


def start_table(model: nn.Module, adapter_name: str, selection: Selection) -> Table:
    """A table of target names: modules matched of possible, r, parameters; and what is left out."""
    adapters = list(adapters_named(model, adapter_name).values())
    kind = type(adapters[0].config).__name__.removesuffix("Config").replace("Lora", "LoRA")
    frozen = not any(p.requires_grad for adapter in adapters for p in adapter.parameters())
    title = f"{kind} adapter '{adapter_name}'{' (frozen)' if frozen else ''}"
    table = Table(title=title, title_justify="left")
    table.add_column("target")
    for column in ("modules", "r", "parameters"):
        table.add_column(column, justify="right")
    for name, row in target_rows(model, adapter_name):
        ranks = "full" if row.full else ", ".join(map(str, sorted(row.ranks))) or "-"
        table.add_row(name, f"{row.matched} of {row.possible}", ranks, f"{row.parameters:,}")
    biases = [
        record.parameter(module).numel()
        for _, module, record in trained_biases(model, adapter_name)
    ]
    if biases:
        table.add_row("bias", str(len(biases)), "full", f"{sum(biases):,}")
    rows = [(f"{path} (output head, frozen)", 1) for path in selection.left_out]
    left = selection.passed_over
    rows += [(f"{path} (frozen before)", len(inside)) for path, inside in left.frozen.items()]
    rows += [(f"{path} ({reason})", 1) for path, reason in left.unfit.items()]
    for text, count in rows[:LEFT_OUT_ROWS]:
        table.add_row(text, f"0 of {count}", "-", "0")
    if others := [count for _, count in rows[LEFT_OUT_ROWS:]]:
        table.add_row(f"... ({len(rows)} left out in all)", f"0 of {sum(others)}", "-", "0")
    return table


def fitted_line(model: nn.Module, adapter_name: str) -> list[str]:
    """A line for the layers whose rank was lowered to what they allow."""
    ranks = fitted_ranks(adapters_named(model, adapter_name))
    if not ranks:
        return []
    names = first_few(dict.fromkeys(f"{shown_name(path)} (r={r})" for path, r in ranks.items()))
    return [f"too small for the rank, which is lower there: {names} (lora.rank_pattern)"]


def left_out_lines(model: nn.Module, adapter_name: str) -> list[str]:
    """A line for modules that carry adapters which no optimizer has."""
    adapters = adapters_named(model, adapter_name)
    paths = [p for p, a in adapters.items() if any(map(is_left_out, a.parameters()))]
    names = dict.fromkeys(map(shown_name, paths))
    return [
        "in no optimizer that configure_optimizers returns, so that adapters there do not train: "
        f"{first_few(paths)}; to train them, name these layers, target_modules: "
        f"[{first_few(names)}] (lora.target_modules)"
    ][: len(paths)]


def untied_lines(model: nn.Module, adapter_name: str) -> list[str]:
    """Modules that train in full away from what they share a tensor with (tied embeddings)."""
    holders: dict[int, list[str]] = defaultdict(list)
    for path, module in walk(model):
        for parameter in base_tensors_of(module)._parameters.values():
            holders[id(parameter)].append(path)
    lines = {}
    for path, layer in layers_with(model, adapter_name):
        own = layer.original_tensors.parameters() if layer.trains_in_place else ()
        for other in [other for tensor in own for other in holders[id(tensor)]]:
            if other and not f"{other}.".startswith(f"{path}."):
                lines[frozenset((path, other))] = (
                    f"{path} shared a weight with {other}, and trains by itself now, as in PEFT: "
                    "the two are no longer tied (lora.modules_to_save)"
                )
    return [*lines.values()]


def start_lines(model: nn.Module, root: nn.Module, adapter_name: str) -> list[str]:
    """Trainable, total and percentage; size of the adapter on disk; what trains in 16 bits."""
    on_disk = total_bytes(adapter_state_dict(root, adapter_name).values())
    lines = [
        trainable_line(model),
        f"adapter on disk {readable_bytes(on_disk)}; the base "
        f"({readable_bytes(base_bytes(model))}) is not saved",
    ]
    lines += [*follower_lines(model), *moved_lines(model)]
    narrow = _trained_in_16_bits(root, adapter_name)
    if narrow:
        lines.append(
            f"in 16 bits, where small steps are rounded away: {first_few(narrow)}; with a "
            "'-mixed' precision they train in 32"
        )
    return lines


def follower_lines(model: nn.Module) -> list[str]:
    """Teachers that carry adapters of their students."""
    if not isinstance(model, LightningModule):
        return []
    carried = [name for name, _ in carried_tensors(model)]
    return [
        f"{f.teacher} is a frozen copy of {f.student}: it carries the same adapters, frozen, for "
        "the module to move as it moves the rest"
        if f.is_copy
        else f"{f.teacher} is frozen and built like {f.student}: it carries adapters that change "
        "nothing unless the module moves them (a momentum teacher); else they go after the run"
        for f in module_state(model).followers
        if any(name.startswith(f"{f.teacher}.") for name in carried)
    ]


def moved_lines(model: nn.Module) -> list[str]:
    """What the module itself has moved of its base so far, if anything, with its size."""
    if not isinstance(model, LightningModule):
        return []
    carried = {name for name, _ in carried_tensors(model)}
    tensors = {
        name: value
        for name, value in module_state(model).baseline.changed(model).items()
        if isinstance(value, torch.Tensor) and name not in carried
    }
    size = readable_bytes(total_bytes(tensors.values()))
    return [
        f"the module itself has moved {size} of its base, and checkpoints hold it: "
        f"{first_few(tensors)}"
    ][: len(tensors)]


def trainable_line(model: nn.Module) -> str:
    """Trainable, total and percentage."""
    trainable = sum(p.numel() for p in trainable_parameters(model).values())
    total = sum(p.numel() for p in model.parameters())
    return f"trainable {trainable:,} of {total:,} parameters ({trainable / max(total, 1):.2%})"


def _trained_in_16_bits(root: nn.Module, adapter_name: str) -> list[str]:
    """Trained biases, which are the base's own parameters."""
    adapters = adapters_named(root, adapter_name).values()
    if not all(adapter.autocast_adapter_dtype for adapter in adapters):
        return []  # as asked for
    return [
        name
        for name, module, record in trained_biases(root, adapter_name)
        if record.parameter(module).dtype in (torch.bfloat16, torch.float16)
    ]


def batch_line(trainer: Trainer) -> str:
    """Effective batch = micro batch x accumulated batches x devices."""
    accumulate, devices = trainer.accumulate_grad_batches, trainer.world_size
    factors = f"{accumulate} accumulated x {devices} devices"
    size = _batch_size(trainer.train_dataloader)
    if size is None:
        return f"effective batch: batches x {factors}"
    return f"effective batch {size * accumulate * devices} = {size} x {factors}"


def _batch_size(loader: object) -> int | None:
    """The batch size of a loader that has one."""
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def end_lines(trainer: Trainer, model: nn.Module) -> list[str]:
    """Paths and sizes of the checkpoints of the Trainer's ModelCheckpoint."""
    saver: Any = trainer.checkpoint_callback
    best, last = (getattr(saver, f"{which}_model_path", "") for which in ("best", "last"))
    only_weights = getattr(saver, "save_weights_only", False)
    # Without a metric it is the newest one.
    label = "best checkpoint" if getattr(saver, "monitor", None) else "checkpoint"
    return [*moved_lines(model), *checkpoint_lines(model, best, last, only_weights, label)]


def checkpoint_lines(
    model: nn.Module, best: str, last: str, weights_only: bool, label: str = "best checkpoint"
) -> list[str]:
    """Paths of the checkpoints, and their sizes beside that of the base."""
    lines = []
    content = "weights only" if weights_only else "with optimizer state"
    base = readable_bytes(base_bytes(model))
    for name, path in ((label, best), ("last checkpoint", last)):
        if path and os.path.exists(path):
            files = [*os.scandir(path)] if os.path.isdir(path) else [path]
            size = readable_bytes(sum(map(os.path.getsize, files)))
            sizes = f"({size} {content}; the base is {base})"
            lines.append(f"{name}: {_nearby(path)} {sizes}")
    return lines


def base_bytes(model: nn.Module) -> int:
    """Size of the base model's tensors."""
    return total_bytes(tensor for _, tensor in base_tensors(model))


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Size of tensors together, of which one may come several times (tied weights)."""
    found = {_place(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What tells a tensor from others: the memory that it lies in, if that can be asked for."""
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        pointer = 0
    return (pointer, tensor.storage_offset(), tensor.numel()) if pointer else (id(tensor),)


def readable_bytes(count: float) -> str:
    """1,234,567 -> '1.2 MB'; decimal units, as file managers show them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _ranks(adapter: nn.Module) -> set[int]:
    """The rank of an adapter, of each of its parts; none where its type has none."""
    ranks = [getattr(part, "r", None) for part in adapter.modules()]
    return {r for r in ranks if isinstance(r, int)}


def _nearby(path: str) -> str:
    """The path relative to the working directory, if it is below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
