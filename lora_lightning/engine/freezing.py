"""Freeze a base, and tell what its user had frozen before: teachers, feature extractors.

All parameters look alike afterwards. So the names of those that were frozen here are remembered on
the module that owns them, where `deepcopy` and `pickle` take them along. When the adapters are
taken off the base stays frozen, but its modules become what they were: then the names are kept
beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parameter import is_lazy

from lora_lightning.adapters.modules_to_save import base_tensors_of
from lora_lightning.engine.bias import trained_biases
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.quantized.bitsandbytes import is_linear4bit, is_linear8bit
from lora_lightning.layers.quantized.torchao import has_torchao_weight
from lora_lightning.layers.traversal import named_parameters, walk

_RECORD = "_frozen_for_adapters"
_QUANTISED = "_frozen_before_quantised"
_kept_beside: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def freeze_parameters(model: nn.Module) -> None:
    """`requires_grad=False` on everything that is in no adapter.

    Raises:
        AdapterStateError: If a layer is lazy: it has no weights yet that could be frozen, or saved.

    """
    lazy = [name for name, parameter in named_parameters(model) if is_lazy(parameter)]
    if lazy:
        raise AdapterStateError(
            f"{lazy[0]!r} is lazy and has no size yet: it would be made at random later, as a part "
            "of the base that is in no file. Run one batch through the model first. (model)"
        )
    kept = {id(record.parameter(module)) for _, module, record in trained_biases(model)}
    free = {module: _free_parameters(module) for _, module in walk(model)}
    for module, parameters in free.items():  # after all are found: one may have several owners
        # Those that train with an adapter, too: whether they do is not for their user to say.
        remember_frozen(module, {*frozen_for_adapters(module), *parameters})
        for parameter in parameters.values():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's own parameters of a module, also where others train in their place."""
    return base_tensors_of(module).named_parameters(recurse=False, remove_duplicate=False)


def _free_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in own_parameters(module) if p.requires_grad}


def frozen_for_adapters(module: nn.Module) -> set[str]:
    """The names of the module's own parameters that were frozen for adapters, not by its user."""
    names: set[str] = module.__dict__.get(_RECORD) or _kept_beside.get(module, set())
    return set(names)


def partly_frozen(module: nn.Module) -> set[str]:
    """Names of the parameters in `module` that its user froze, if he left others in it free."""
    free = {
        f"{path}.{name}" if path else name: name in frozen_for_adapters(part)
        for path, part in walk(module)
        for name, _ in own_parameters(part)
    }
    return {name for name, is_free in free.items() if not is_free} if any(free.values()) else set()


def remember_frozen(module: nn.Module, names: set[str]) -> None:
    """Record what `frozen_for_adapters` says of the module."""
    module.__dict__.pop(_RECORD, None)
    _kept_beside.pop(module, None)
    if names:
        module.__dict__[_RECORD] = names


def keep_records_beside(model: nn.Module) -> None:
    """Take the records off the modules, which carry no adapters any more."""
    for _, module in walk(model):
        names = module.__dict__.pop(_RECORD, None)
        if names:
            _kept_beside[module] = names


def remember_quantised(model: nn.Module, frozen: list[str]) -> None:
    """Record on layers that were quantised just now that they were in a submodule of `frozen`."""
    for path in frozen:
        for _, module in walk(model.get_submodule(path)):
            if _is_quantised(module):
                module.__dict__[_QUANTISED] = True


def frozen_by_user(model: nn.Module) -> list[str]:
    """The outermost submodules whose parameters do not require gradients, and did not before.

    A quantised weight cannot require them, so it says nothing, nor does its bias, unless what it
    was before is known (`remember_quantised`).
    """
    frozen: dict[str, bool] = {}  # of every module that has, or holds, a parameter that tells
    for path, module in walk(model):
        for free in _told_by(module):
            parts = path.split(".")
            for depth in range(len(parts) if path else 0, 0, -1):
                outer = ".".join(parts[:depth])
                frozen[outer] = frozen.get(outer, True) and not free
    found: list[str] = []
    for path in (path for path, _ in walk(model) if frozen.get(path)):
        if not found or not path.startswith(f"{found[-1]}."):
            found.append(path)
    return found


def _told_by(module: nn.Module) -> list[bool]:
    """Of each of the module's own parameters, whether its user left it free to train."""
    if _is_quantised(module):
        return [False] if _QUANTISED in module.__dict__ else []
    ours = frozen_for_adapters(module)
    return [
        parameter.requires_grad or name in ours
        for name, parameter in own_parameters(module)
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1
    ]


def _is_quantised(module: nn.Module) -> bool:
    return is_linear4bit(module) or is_linear8bit(module) or has_torchao_weight(module)
