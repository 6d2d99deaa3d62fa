"""The class that a module gets when adapters are put on it: a subclass of its own class."""

from __future__ import annotations

import types
from typing import Any, Generic, TypeVar, cast

from torch import nn

from lora_lightning.layers.instance_forward import LayerForward, PatchableLayer

_T = TypeVar("_T")
_CLASSES: dict[tuple[type[PatchableLayer], type[nn.Module]], Any] = {}
# By the parent that the classes with a `__dict__` of this layout have in common. Generic wants a
# variable.
_LAYOUTS: dict[type, type] = {
    cast(type, Generic): types.new_class("GenericLayout", (cast(Any, Generic)[_T],))
}


def adapted_class(layer_type: type[PatchableLayer], base_type: type[nn.Module]) -> Any:
    """The subclass of `base_type` that carries adapters; the same one every time."""
    if (layer_type, base_type) in _CLASSES:
        return _CLASSES[layer_type, base_type]
    namespace = {
        "__module__": layer_type.__module__,
        "__doc__": base_type.__doc__,
        "layer_type": layer_type,
        "base_type": base_type,
        "forward": LayerForward(layer_type.forward),
        "forward_with_adapters": layer_type.forward,
    }
    bases = (*_layout_of(base_type), layer_type, *_covers_of(base_type), base_type)
    made = types.new_class(
        f"Adapted{base_type.__name__}", bases, exec_body=lambda body: body.update(namespace)
    )
    return _CLASSES.setdefault((layer_type, base_type), made)


def _coverable(name: str, computed: property) -> property:
    """A tensor that the class computes (a parametrization), unless `covered` puts one before it."""

    def read(layer: nn.Module) -> Any:
        if name in layer.__dict__:
            return layer.__dict__[name]
        return cast(Any, computed.fget)(layer)

    return property(read, computed.fset)


def _covers_of(base_type: type[nn.Module]) -> tuple[type, ...]:
    """A class of its own: who takes a parametrization off deletes from that of the module.

    None where torch's own code computes, which nobody covers: torch.compile takes it as it is.
    """
    codes = [getattr(base_type, name, None) for name in ("forward", "_conv_forward")]
    if all(code is None or str(code.__module__).startswith("torch.nn.") for code in codes):
        return ()
    computed = {name: getattr(base_type, name, None) for name in ("weight", "bias")}
    covers = {n: _coverable(n, c) for n, c in computed.items() if isinstance(c, property)}
    return (type("Covers", (), covers),) if covers else ()


def _layout_of(base_type: type[nn.Module]) -> tuple[type, ...]:
    """What stands first among the bases, so that instances of `base_type` can take the new class.

    Python compares the classes that gave the instances their `__dict__`: for most modules that is
    nn.Module, which a layer has, too. Where it is another one (a class with ABC or Generic in front
    of the module, whose parents have no `__dict__`), the new class needs one that is made alike.
    """
    giver: type = base_type
    while giver.__base__ is not None and giver.__base__.__dictoffset__:
        giver = giver.__base__
    parent = giver.__base__
    if parent is None or parent is object:
        return ()
    if parent not in _LAYOUTS:
        _LAYOUTS[parent] = types.new_class(f"{parent.__name__}Layout", (parent,))
    return (_LAYOUTS[parent],)
