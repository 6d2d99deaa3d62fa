"""Averages and penalties of a module's own that go by the parameters of before there were adapters.

An EMA by names (`self.names = {n: ... for n, p in net.named_parameters()}`), by the tensors that it
was given (torch_ema), or by copies of them in order; a penalty on what moved from its start. They
note all parameters of a network when the module is made. Adapters come later: such code passes over
them, or fails. A teacher that is to follow in this way would not, which is refused; the rest is
said when training begins, as nobody can know what a note is for.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lora_lightning.engine.followers import Follower
from lora_lightning.errors import LoraError, TargetError
from lora_lightning.layers.traversal import named_adapted_layers, walk
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.module_state import module_state

_COLLECTIONS = (Mapping, list, tuple, set, frozenset, deque)
_FOREIGN = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "numpy")


class Note(NamedTuple):
    """Attributes: the attribute that notes, the path of the network, what it notes of it."""

    attribute: str
    network: str
    what: str


def find_notes(module: LightningModule) -> list[Note]:
    """What the module notes of all parameters of a network that carries no adapters yet."""
    ends = {name for _, part in walk(module) for name in part._parameters}
    candidates = [
        (f"{path}.{name}" if path else name, values, is_helper)
        for path, part in walk(module)
        for name, values, is_helper in _attributes(part)
        if sum(_may_note(value, ends) for value in values) > 1
    ]
    if not candidates:
        return []
    networks = [
        (path, dict(part.named_parameters()))
        for path, part in walk(module)
        if sum(1 for _ in part.parameters()) > 1
    ]
    found: dict[str, Note] = {}
    registered = {id(parameter) for parameter in module.parameters()}
    for attribute, values, is_helper in candidates:
        for path, parameters in networks:  # the outermost first
            what = _noted(values, parameters, registered)
            # A list of the parameters themselves is for an optimizer, which gets what trains.
            own_list = what == "tensors" and not is_helper
            if what and not own_list and not attribute.startswith(f"{path}." if path else "."):
                found.setdefault(attribute, Note(attribute, path, what))
    return [*found.values()]


def check_teachers(module: LightningModule, followers: list[Follower]) -> None:
    """Refuse (TargetError) teachers whose parameters somebody goes through by their names."""
    for note in module_state(module).notes:
        for follower in followers:
            moved = note.what == "names" and note.network in (follower.teacher, follower.student)
            if moved and not follower.is_free and _carries(module, follower.student):
                raise TargetError(
                    f"{note.attribute!r} notes the parameters of {note.network!r} by their names, "
                    f"and {follower.teacher!r} would not follow the adapters of "
                    f"{follower.student!r}, which come later: their names are not among them. Go "
                    "through named_parameters() of both each time, or use "
                    "torch.optim.swa_utils.AveragedModel or Lightning's WeightAveraging. "
                    "(lora.target_modules)"
                )


def warn_of_notes(module: LightningModule) -> None:
    """Say what the module notes of networks that carry adapters now."""
    for note in _of_adapted(module):
        rank_zero_warn(
            f"{_in_words(note)} Note them in on_fit_start instead. (lora.target_modules)"
        )


def explain_failure(module: LightningModule, error: BaseException) -> None:
    """Add to an error of a run what may be its cause."""
    notes = [] if isinstance(error, LoraError) else _of_adapted(module)
    if notes and isinstance(error, Exception) and hasattr(error, "add_note"):
        error.add_note("\n".join(map(_in_words, notes)))


def _in_words(note: Note) -> str:
    network = f"of {note.network!r}" if note.network else "of the module"
    return (
        f"{note.attribute!r} holds the {note.what} of all parameters {network} from before "
        "adapters came: an average or a penalty that goes by it passes over the adapters, which "
        "are what trains, or fails."
    )


def _of_adapted(module: LightningModule) -> list[Note]:
    return [note for note in module_state(module).notes if _carries(module, note.network)]


def _carries(module: nn.Module, path: str) -> bool:
    inside = f"{path}." if path else ""
    return any(f"{layer}.".startswith(inside) for layer, _ in named_adapted_layers(module))


def _attributes(part: nn.Module) -> Iterator[tuple[str, list[Any], bool]]:
    """Name and content of collections that a module keeps; whether in a plain object of its own."""
    for name, value in [*vars(part).items(), *part._modules.items()]:
        if name.startswith("_") or value is None:
            continue
        if isinstance(value, (nn.ParameterList, *_COLLECTIONS)):
            yield name, list(value), False
        elif hasattr(value, "__dict__") and _is_plain(value):
            for inner, held in vars(value).items():
                if isinstance(held, _COLLECTIONS):
                    yield f"{name}.{inner}", list(held), True


def _may_note(value: Any, ends: set[str]) -> bool:
    """Tell whether it could stand for a parameter, of which names have one of these `ends`."""
    if isinstance(value, str):
        return value.rpartition(".")[2] in ends
    return isinstance(value, (Tensor, weakref.ReferenceType))


def _is_plain(value: Any) -> bool:
    kind = value if isinstance(value, type) else type(value)
    foreign = kind.__module__.partition(".")[0] in (*_FOREIGN, "builtins", "functools")
    return not foreign and not isinstance(value, (nn.Module, type)) and not callable(value)


def _noted(values: Iterable[Any], parameters: dict[str, nn.Parameter], registered: set[int]) -> str:
    """What `values` have of all `parameters`, or of those that are free; "" for nothing."""
    items = [value() if isinstance(value, weakref.ReferenceType) else value for value in values]
    free = {name: p for name, p in parameters.items() if p.requires_grad}
    for wanted in (parameters, free):
        if len(wanted) < 2:
            continue
        if {*wanted} <= {item for item in items if isinstance(item, str)}:
            return "names"
        tensors = [item for item in items if isinstance(item, Tensor)]
        if {*map(id, wanted.values())} <= {*map(id, tensors)}:
            return "tensors"
        others = [tensor for tensor in tensors if id(tensor) not in registered]
        if len(others) == len(wanted) and all(map(_same, others, wanted.values())):
            return "copies"
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    unknown = one.is_meta or other.is_meta or one.shape != other.shape or one.dtype != other.dtype
    return not unknown and torch.equal(one.detach().to(other.device), other.detach())
