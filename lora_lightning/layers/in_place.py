"""Exchange the tensors of a module that trains in full (`modules_to_save`) for those of the base.

While an adapter with trained tensors of its own acts, the module and all inside it hold these, as
the same objects; else they hold the base's. So its methods, direct reads, hooks, parametrizations
see what acts, and what they write reaches it. No value is copied: a graph that was recorded before
a switch keeps the tensors that it was recorded with.

Under FSDP other code writes into the module, too: on every forward it puts gathered parameters into
the places that it knows of, those where tensors are held among them. There the places where tensors
are held say what is right, and the module is brought in line when it computes. Elsewhere the module
does, which may have been given a new buffer or parameter since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_lightning.adapters.modules_to_save import HeldTensors, OriginalTensors
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.offloading import offloading_hook
from lora_lightning.utilities.dtensor import full_tensor, is_sharded
from lora_lightning.utilities.wrappers import WRAPPED, unwrapped

# A module of the tree, what is held of it for one adapter (or the base), and the base's own.
Place = tuple[nn.Module, HeldTensors, HeldTensors]


def places(module: nn.Module, held: HeldTensors, originals: HeldTensors) -> list[Place]:
    """Match each module of a tree with what is held of it.

    Raises:
        AdapterStateError: If a module or a tensor is gone that trains in full.

    """
    gone = [
        name
        for inside, own in (
            (held._parameters, module._parameters),
            (held._buffers, module._buffers),
            (held._modules, module._modules),
        )
        for name in inside
        if name not in own
    ]
    if gone:
        raise AdapterStateError(
            f"A {type(module).__name__} has no {gone[0]!r} of its own any more, which trains in "
            "full with an adapter. Replace, parametrize or take out what is in it before its "
            "adapter is put on. (lora.modules_to_save)"
        )
    found: list[Place] = [(module, held, originals)]
    for name, below in held._modules.items():
        child: Any = module._modules[name]
        original = cast(HeldTensors, originals._modules[name])
        child = child if name in WRAPPED else unwrapped(child)
        found += places(child, cast(HeldTensors, below), original)
    return found


def kept_beside(model: nn.Module, module: nn.Module) -> str | None:
    """The attribute in `model` that keeps tensors of `module` by itself, as a list of them does.

    What reads it would go on with the tensors that were there before.
    """
    tensors = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for path, part in model.named_modules():
        if isinstance(part, nn.RNNBase):  # brings its list in line itself
            continue
        for name, value in vars(part).items():
            registered = name in ("_parameters", "_buffers")
            if not registered and any(id(item) in tensors for item in _items(value)):
                return f"{path}.{name}" if path else name
    return None


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, (list, tuple, set, deque)):
        for item in value:
            yield from _items(item)
    else:
        yield value


def show(layer: nn.Module, held: HeldTensors, originals: OriginalTensors) -> None:
    """Have `layer` and all inside it hold the tensors of `held`."""
    mode = layer.get_submodule("adapters").training
    for module, node, _ in places(layer, held, originals):
        module._parameters.update(node._parameters)
        module._buffers.update(node._buffers)
        if "train" in module.__dict__:  # whether its statistics move depends on whose they are
            module.train(mode)


def take(layer: nn.Module, held: HeldTensors, originals: OriginalTensors) -> None:
    """Hold what `layer` and all inside it have now: new objects, of a cast or of a load."""
    for module, node, _ in places(layer, held, originals):
        node._parameters.update({name: module._parameters[name] for name in node._parameters})
        node._buffers.update({name: module._buffers[name] for name in node._buffers})


def reconcile(layer: nn.Module, held: HeldTensors, originals: OriginalTensors) -> None:
    """Make one of the tree and of what is held of it, where the tree holds the tensors of `held`.

    A tensor that somebody has put into the module since is held from now on; but not the base's own
    (`tie_weights`, say), and nothing that FSDP has put there.

    Raises:
        AdapterStateError: If accelerate has taken away what the tree holds.

    """
    trained = held is not originals
    for module, node, original in places(layer, held, originals):
        _check_not_offloaded(module)
        for name, own in node._buffers.items():
            found = module._buffers[name]
            if trained and found is original._buffers[name]:
                module._buffers[name] = own
            elif found is not own:
                node._buffers[name] = found
        for name, parameter in node._parameters.items():
            new = module._parameters[name]
            if new is parameter or (not trained and is_sharded(parameter)):  # FSDP looks after it
                continue
            if _among_processes() or (trained and new is original._parameters[name]):
                module._parameters[name] = parameter
            else:
                node._parameters[name] = new


@contextmanager
def computing_with(
    layer: nn.Module, held: HeldTensors, originals: OriginalTensors
) -> Iterator[None]:
    """Inside, `layer` and all in it hold the tensors of `held`, parameters in the base's dtype.

    What is written in place into a parameter that was cast is written to the one that trains.
    """
    tree = places(layer, held, originals)
    before: list[tuple[dict[str, Any], str, Any]] = []  # a dictionary, a name in it, what was there
    cast: list[tuple[Tensor, Tensor]] = []
    for module, node, original in tree:
        for name, parameter in node._parameters.items():
            if parameter is None:
                continue
            # By attribute: FSDP1 takes them out of the dictionary while it has gathered them.
            dtype = getattr(original, name).dtype
            value: Tensor = parameter
            if parameter.itemsize > dtype.itemsize:  # FSDP's policy may have narrowed it already
                value = _narrowed(parameter, dtype)
                cast.append((parameter, value))
            _put(module._parameters, name, value, before)
        for name, buffer in node._buffers.items():
            _put(module._buffers, name, buffer, before)
    try:
        yield
    finally:
        if not torch.compiler.is_compiling():
            for module, node, _ in tree:  # buffers may be new objects by now
                node._buffers.update({name: module._buffers[name] for name in node._buffers})
            _write_back(cast)
        for place, name, kept in before:
            place[name] = kept


@contextmanager
def computing_with_base(layer: nn.Module, originals: OriginalTensors) -> Iterator[None]:
    """Inside, the tree of `layer` holds the base's tensors, gathered where FSDP2 has parts of them.

    FSDP2 itself may have gathered what trains instead, which has been in the same places.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module, node, _ in places(layer, originals, originals):
        for name, parameter in node._parameters.items():
            if is_sharded(parameter):
                shown: Tensor = module._parameters[name]  # type: ignore[assignment]
                dtype = parameter.dtype if is_sharded(shown) else shown.dtype  # as its policy says
                _put(module._parameters, name, full_tensor(parameter).to(dtype), before)
    try:
        yield
    finally:
        for place, name, kept in before:
            place[name] = kept


def _put(place: dict[str, Any], name: str, value: Any, before: list[Any]) -> None:
    if place[name] is not value:
        before.append((place, name, place[name]))
        place[name] = value


def _narrowed(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return parameter.to(dtype)
    # A tensor made in inference mode does not tell whether it was written to.
    with torch.inference_mode(False), torch.no_grad():
        return parameter.to(dtype)


@torch.no_grad()
def _write_back(cast: list[tuple[Tensor, Tensor]]) -> None:
    for wide, narrow in cast:
        if narrow._version:  # max_norm of an embedding, say
            wide.copy_(torch.where(narrow == wide.to(narrow.dtype), wide, narrow.to(wide.dtype)))


def _check_not_offloaded(module: nn.Module) -> None:
    if offloading_hook(module) is not None:
        raise AdapterStateError(
            f"A {type(module).__name__} was offloaded (accelerate) after an adapter that trains it "
            "in full was put on: its hook would bring in what was there then. Offload the model "
            "before, without this module, or take the hooks off: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True). (lora.modules_to_save)"
        )


def _among_processes() -> bool:
    return dist.is_available() and dist.is_initialized()
