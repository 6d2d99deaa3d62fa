"""Optimizers that hold exactly the tensors that train.

Users pass `self.parameters()`, groups by name, or (LightningCLI) an optimizer that was built
before any adapter existed. Whatever it was: frozen tensors go, each trainable one is in exactly
one group, and groups stay where they are, because schedulers count them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

import torch
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer

from lora_lightning.errors import OptimizerError, first_few
from lora_lightning.layers.traversal import adapter_owners, named_parameters
from lora_lightning.utilities.is_a import is_a

# id of a parameter -> the groups that it was in or was meant for; of several optimizers perhaps
Groups = dict[int, list[dict[str, Any]]]

_LEFT_OUT = "_in_no_optimizer"
_one_at_a_time = RLock()  # a method of torch's class is exchanged for a while


@contextmanager
def frozen_left_out() -> Iterator[Groups]:
    """Leave frozen parameters out of the optimizers that this thread makes inside.

    Some look at their parameters at once: Adagrad makes a state for each, Muon refuses what is
    not a matrix. Yields the groups that the frozen ones were meant for.
    """
    meant_for: Groups = defaultdict(list)
    thread = get_ident()

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        if get_ident() != thread:
            return original(self, param_group)
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        kept = [p for p in params if _trains(p)]
        original(self, {**param_group, "params": kept})
        for p in params:
            if not _trains(p):
                meant_for[id(_tensor(p))].append(self.param_groups[-1])
        return None

    with _one_at_a_time:
        original = Optimizer.add_param_group
        Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
        try:
            yield meant_for
        finally:
            Optimizer.add_param_group = original  # type: ignore[method-assign]


def cover_trainable(
    optimizers: list[Optimizer],
    model: nn.Module,
    meant_for: Groups,
    unnamed: Collection[int] = (),
) -> list[nn.Parameter]:
    """Drop frozen parameters and add missing trainable ones, in place.

    A missing one joins the group of a base weight of the module that it adapts, in every optimizer
    that holds that weight, else the first group of the first optimizer; one that is no matrix a
    group that is not Muon's. But where the optimizers hold some of the modules that carry adapters
    which nobody asked for by name (`unnamed`, ids of their parameters), the others are left out:
    their user wants them as they are (the network of a perceptual loss).

    Returns:
        What is left out.

    Raises:
        OptimizerError: If an optimizer is left without a parameter, or takes none of this shape.

    """
    groups_of: Groups = defaultdict(list, {i: list(groups) for i, groups in meant_for.items()})
    covered: set[int] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                groups_of[id(p)].append(group)
            # In place: some optimizers (LBFGS) keep a reference to this very list.
            group["params"][:] = [p for p in group["params"] if p.requires_grad]
            covered.update(id(p) for p in group["params"])
        for p in list(optimizer.state):
            if isinstance(p, torch.Tensor) and not p.requires_grad:
                del optimizer.state[p]
    base = {name: p for name, p in named_parameters(model) if not p.requires_grad}
    owners = adapter_owners(model)
    missing: list[tuple[str, nn.Parameter, list[list[dict[str, Any]]]]] = []
    some_held = False
    for name, p in trainable_parameters(model).items():
        wished = []
        if id(p) not in covered:
            owner = owners.get(id(p), name.rpartition(".")[0]) + "."
            wished = [groups_of[id(q)] for n, q in base.items() if n.startswith(owner)]
            missing.append((name, p, wished))
        some_held |= id(p) in unnamed and (id(p) in covered or any(wished))
    left_out = []
    for name, p, wished in missing:
        if some_held and id(p) in unnamed and not any(wished):
            left_out.append(p)
        else:
            _join(name, p, _groups_for(p, optimizers, wished))
    for index, optimizer in enumerate(optimizers):
        if not any(group["params"] for group in optimizer.param_groups):
            raise OptimizerError(
                f"Optimizer {index} ({type(optimizer).__name__}) is left without any parameter: "
                "all that configure_optimizers gave it is frozen. Return it only when some of its "
                "parameters train: list their module in modules_to_save. (lora.modules_to_save)"
            )
    return left_out


def _groups_for(
    p: nn.Parameter, optimizers: list[Optimizer], wished: list[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The first of the `wished` that optimizers have which take `p`; else their first group."""
    muon = getattr(torch.optim, "Muon", ())  # of torch 2.9
    fitting = [
        group
        for optimizer in optimizers
        if p.ndim == 2 or not isinstance(optimizer, muon)
        for group in optimizer.param_groups
    ]
    known = {id(group) for group in fitting}
    found = ([group for group in groups if id(group) in known] for groups in wished)
    return next(filter(None, found), fitting[:1])


def _join(name: str, p: nn.Parameter, groups: list[dict[str, Any]]) -> None:
    if not groups:
        raise OptimizerError(
            f"{name} {list(p.shape)} trains and is no matrix, but Muon, the only optimizer "
            "that configure_optimizers returned, takes nothing else. Return another one, "
            "or let only matrices train. (lora.target_modules, lora.modules_to_save)"
        )
    for group in groups:
        group["params"].append(p)


def check_coverage(
    optimizers: Iterable[Optimizer],
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter] | None = None,
) -> None:
    """Raise OptimizerError unless just the trainable tensors are held, once in an optimizer.

    Several optimizers may share some: each makes steps of its own. `trainable`: default is what
    requires gradients now.
    """
    counts = [Counter(id(p) for g in o.param_groups for p in g["params"]) for o in optimizers]
    held = {i for count in counts for i in count}
    twice = {i for count in counts for i, number in count.items() if number > 1}
    trainable = trainable_parameters(model) if trainable is None else trainable
    names = {id(p): name for name, p in named_parameters(model)}
    foreign = held - {id(p) for p in trainable.values()}
    found = {
        "in no optimizer": [name for name, p in trainable.items() if id(p) not in held],
        "in more than one group": [names.get(i, "?") for i in twice],
        "in an optimizer but not trainable": [
            names.get(i, "a tensor that is not the module's") for i in foreign
        ],
    }
    problems = [f"{what}: {first_few(tensors)}" for what, tensors in found.items() if tensors]
    if problems:
        raise OptimizerError(
            "The optimizers do not hold exactly the trainable tensors:\n  "
            + "\n  ".join(problems)
            + "\nWas requires_grad changed, or a parameter replaced, after configure_optimizers?"
        )


def default_optimizer(model: nn.Module, lr: float, fused: bool = True) -> Optimizer:
    """AdamW over what trains, fused where torch has it: for modules that bring no optimizer."""
    params = list(trainable_parameters(model).values())
    fused = fused and all(_can_fuse(p) for p in params)
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=fused)


def may_be_fused(trainer: Trainer) -> bool:
    """True if Lightning can do with a fused optimizer what a run asks for.

    It takes each for one that unscales gradients by itself, and refuses to clip for it under mixed
    precision, with a gradient scaler or, in bfloat16, without.
    """
    clips_in_bfloat16 = trainer.precision == "bf16-mixed" and bool(trainer.gradient_clip_val)
    return trainer.precision != "16-mixed" and not clips_in_bfloat16


def find_optimizers(configured: object) -> list[Optimizer]:
    """The optimizers in whatever `configure_optimizers` returned.

    Lightning takes for one whatever has the methods and attributes of torch's.
    """
    if isinstance(configured, Optimizable):
        found: Any = configured
        return [found]
    if isinstance(configured, Mapping):
        return find_optimizers(list(configured.values()))
    if isinstance(configured, (list, tuple)):
        return [optimizer for item in configured for optimizer in find_optimizers(item)]
    return []


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer itself, where Lightning has put a `LightningOptimizer` around it."""
    return optimizer.optimizer if is_a(optimizer, "LightningOptimizer") else optimizer


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, but for those that are left out."""
    return {n: p for n, p in named_parameters(model) if p.requires_grad and not is_left_out(p)}


def mark_left_out(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Record what requires gradients (which DDP counts on) and no optimizer of the run is to have.

    What was recorded before is forgotten.
    """
    for _, p in named_parameters(model):
        p.__dict__.pop(_LEFT_OUT, None)
    for p in parameters:
        p.__dict__[_LEFT_OUT] = True


def is_left_out(parameter: nn.Parameter) -> bool:
    """Tell whether `mark_left_out` has recorded it."""
    return _LEFT_OUT in parameter.__dict__


def _tensor(param: Any) -> Any:
    return param[1] if isinstance(param, tuple) else param  # torch also takes (name, tensor)


def _trains(param: Any) -> bool:
    return bool(_tensor(param).requires_grad)


def _can_fuse(param: nn.Parameter) -> bool:
    return param.device.type in ("cuda", "cpu", "mps", "xpu") and param.is_floating_point()
