"""One examination of the engine that any model with its inputs can be put through."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lora_lightning import (
    AdapterStateError,
    LoraConfig,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    unload,
    unmerge_adapter,
)
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.by_weight import AdaptedByWeight
from lora_lightning.layers.registry import layer_type_for
from lora_lightning.layers.traversal import named_adapted_layers

RANK = 2


@dataclass
class Findings:
    """What the examination saw, for tests that ask for more than that it holds.

    Attributes:
        kinds: Names of the layer classes.
        uncalled: Layers that forward never called.
        not_merged: What `merge_adapter` said where it refused.
        peft_type: Of the folder.
        not_in_peft: What peft said where it does not load a folder of that type.

    """

    kinds: set[str] = field(default_factory=set)
    uncalled: list[str] = field(default_factory=list)
    not_merged: str = ""
    peft_type: str = ""
    not_in_peft: str = ""


def examine_architecture(base: nn.Module, inputs: dict[str, Tensor], folder: Path) -> Findings:
    """Put LoRA on every layer that can carry it and check all that the engine promises.

    Raises:
        AssertionError: Naming what does not hold.

    """
    found = Findings()
    needed, called = weights_with_gradients(base, inputs)
    # Frozen: torch rounds some products otherwise where a weight trains.
    base = copy.deepcopy(base).requires_grad_(False)
    before = outputs(base, inputs)
    targets = adaptable(base)
    found.uncalled = sorted({*targets} - called)
    model = copy.deepcopy(base)
    inject_adapter(model, LoraConfig(r=RANK, target_modules=sorted({*targets} & called)))
    layers = dict(named_adapted_layers(model))
    found.kinds = {layer.layer_type.__name__ for layer in layers.values()}
    check_equal(outputs(model, inputs), before, "a fresh adapter changes the output")
    randomize(model)
    check_gradients(model, inputs, needed)
    adapted = outputs(model, inputs)
    assert difference(adapted, before) > 1e-4, "the adapter has no effect"
    with disable_adapter(model):
        check_equal(outputs(model, inputs), before, "disable_adapter does not give the base")

    found.peft_type, found.not_in_peft = check_folders(base, model, inputs, folder)
    if found.peft_type != "LORA":  # because of some of the layers: what of the others?
        others = copy.deepcopy(base)
        if paths := portable(layers):
            inject_adapter(others, LoraConfig(r=RANK, target_modules=paths))
            randomize(others)
            _, found.not_in_peft = check_folders(base, others, inputs, folder / "portable")

    try:
        merge_adapter(model)
    except AdapterStateError as error:
        found.not_merged = str(error)
    else:
        assert difference(outputs(model, inputs), adapted) < 1e-4, "merging changes the output"
        unmerge_adapter(model)
    assert difference(outputs(model, inputs), adapted) == 0, "unmerging leaves something"
    unload(model)
    check_equal(outputs(model, inputs), before, "unload does not give the base's output")
    check_same_model(model, base)
    return found


def adaptable(model: nn.Module) -> list[str]:
    """Every layer with a weight of its own that takes an adapter of rank `RANK`."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    wanted = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if layer_type_for(module) is None or weight is None or owners[id(weight)] > 1:
            continue
        groups = getattr(module, "groups", 1)
        if min(weight.shape[:2]) * groups >= RANK and RANK % groups == 0 and not is_router(module):
            wanted.append(path)
    return wanted


def is_router(module: nn.Module) -> bool:
    """True for a Linear whose class chooses experts: it answers by no tensor."""
    return "Router" in type(module).__name__


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All tensors that the model answers, in one order."""
    return tensors(model(**inputs))


def tensors(value: Any) -> list[Tensor]:
    """The floating point tensors in a structure."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in tensors(part)] if isinstance(value, (list, tuple)) else []


def check_equal(found: list[Tensor], wanted: list[Tensor], what: str) -> None:
    """Demand the same bits."""
    assert len(found) == len(wanted), what
    assert all(map(torch.equal, found, wanted)), what


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference of the tensors."""
    assert len(found) == len(wanted), "other outputs"
    return max(
        float((one - other).norm() / other.norm().clamp(min=1e-6))
        for one, other in zip(found, wanted, strict=True)
    )


def randomize(model: nn.Module) -> None:
    """Random values for all that trains, the same every time."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A number that depends on every output."""
    generator = torch.Generator().manual_seed(3)
    found = [y for y in tensors(model(**inputs)) if y.requires_grad]
    return sum((y * torch.randn(y.shape, generator=generator)).sum() for y in found)


def weights_with_gradients(base: nn.Module, inputs: dict[str, Tensor]) -> tuple[set[str], set[str]]:
    """By plain torch, the paths of modules whose weight gets a gradient, and of those called."""
    model = copy.deepcopy(base).requires_grad_(True)
    called: set[str] = set()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    loss(model, inputs).backward()
    weights = {path: module._parameters.get("weight") for path, module in model.named_modules()}
    return {
        path
        for path, weight in weights.items()
        if weight is not None and weight.grad is not None and weight.grad.abs().max() > 1e-7
    }, called


def check_gradients(model: nn.Module, inputs: dict[str, Tensor], needed: set[str]) -> None:
    """Demand gradients of every adapter whose weight gets one, and of nothing else."""
    loss(model, inputs).backward()
    for path, layer in named_adapted_layers(model):
        for name, parameter in layer.adapters["default"].named_parameters():
            gets = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            assert gets or path not in needed, f"{path}.{name} gets no gradient"
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad), "base trains"
    model.zero_grad()


def portable(layers: dict[str, AdaptedLayer]) -> list[str]:
    """Layers of kinds that PEFT has, whose names it does not take for experts."""
    return [
        path
        for path, layer in layers.items()
        if not isinstance(layer, AdaptedByWeight)
        and path.rpartition(".")[2] not in ("gate_proj", "up_proj", "down_proj")
    ]


def check_folders(
    base: nn.Module, model: nn.Module, inputs: dict[str, Tensor], folder: Path
) -> tuple[str, str]:
    """Demand that the adapter's folder gives the same here and in peft: (its type, refusal)."""
    adapted = outputs(model, inputs)
    save_adapter(model, folder / "ours")
    again = copy.deepcopy(base)
    load_adapter(again, folder / "ours")
    assert difference(outputs(again, inputs), adapted) < 1e-5, "our folder gives something else"
    config = json.loads((folder / "ours" / "adapter_config.json").read_text())
    refusal = check_peft(base, inputs, adapted, folder) if config["peft_type"] == "LORA" else ""
    return config["peft_type"], refusal


def check_peft(
    base: nn.Module, inputs: dict[str, Tensor], adapted: list[Tensor], folder: Path
) -> str:
    """Demand that peft computes the same from our folder, and we from peft's, unless it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").eval()
            computed = outputs(theirs.base_model.model, inputs)
        except (ValueError, AttributeError) as error:  # it refuses, or its wrapper lacks something
            return str(error)
        assert difference(computed, adapted) < 1e-4, "peft computes something else"
        theirs.save_pretrained(folder / "theirs", save_embedding_layers=False)
    back = copy.deepcopy(base)
    load_adapter(back, folder / "theirs")
    assert difference(outputs(back, inputs), adapted) < 1e-5, "peft's folder gives something else"
    return ""


def check_same_model(model: nn.Module, base: nn.Module) -> None:
    """Demand the classes, the parameters and their bits of the base."""
    for (path, module), (other, original) in zip(
        model.named_modules(), base.named_modules(), strict=True
    ):
        assert (path, type(module)) == (other, type(original)), "unload leaves a class"
    found, wanted = model.state_dict(), base.state_dict()
    assert found.keys() == wanted.keys(), "unload leaves a tensor"
    assert all(torch.equal(found[key], wanted[key]) for key in wanted), "the base has moved"
