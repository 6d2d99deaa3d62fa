"""A module that carries adapters while it stays itself.

The module's `__class__` becomes a cached subclass of its own class (what
`torch.nn.utils.parametrize` and FSDP2 do too) and the module gains one child, `adapters`. So its
parameters keep their names, `isinstance` and `.weight` keep working, and taking the adapters off
restores exactly the class that was there. `conversion.py` does it.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterDict, Base, Convolution, MultiWeightAdapter
from lora_lightning.adapters.modules_to_save import ModulesToSaveCopy
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.composition import compose, part_of, split_copy
from lora_lightning.layers.mixed_batch import forward_by_row
from lora_lightning.utilities.autocast import without_autocast


class AdaptedLayer(nn.Module):
    """Mixin of the dynamic subclass.

    The map of a layer is composed of the adapters that are applied, in the order in which they were
    added (see `adapters/base.py`). A kind of module says, in a file of its own, what its weights
    are, how they are read and written, and how they act on an input.

    Attributes:
        adapters: The adapters by name.
        active_adapters: Names of those that take part in forward.
        adapters_enabled: False inside `disable_adapter`.
        merged_adapters: Names of those that are in the weights at present.
        row_adapters: Inside `adapters_per_row`, the adapter's name of each row (None: the base).

    """

    kind = "module"  # which adapter classes fit
    layer_type: type[AdaptedLayer]  # these two: what the dynamic class is made of
    base_type: type[nn.Module]
    adapters: AdapterDict
    row_adapters: list[str | None] | None
    weight: Tensor
    bias: Tensor | None
    _active: list[str]
    _enabled: bool
    _merged: list[str]
    _kept: dict[str, Any]  # what restores each written parameter, by its name
    _instance_forward: Any

    # -- what a kind of module says about itself -------------------------------------------------

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape, in the canonical layout, of every weight that an adapter can sit on, by name."""
        return {}

    def convolution(self) -> Convolution | None:
        """The geometry, of a convolution."""
        return None

    def dense_weight(self, name: str = "weight") -> Tensor:
        """A weight as it is now, dense, in the canonical layout."""
        return cast(Tensor, getattr(self, name))

    def weight_dtype(self, name: str = "weight") -> torch.dtype:
        """The dtype that a weight's values have in the module's maths."""
        return cast(Tensor, getattr(self, name)).dtype

    def bias_name(self, name: str = "weight") -> str:
        """The parameter that holds the bias of a weight."""
        return "bias"

    def file_places(self, names: list[str]) -> dict[str, str]:
        """What PEFT's files put between the module's path and the tensors of each weight."""
        return {name: f"{name}." for name in names}

    def peft_supports(self, adapter: Adapter) -> bool:
        """Whether PEFT computes the same from this adapter on this module."""
        return not isinstance(adapter, MultiWeightAdapter)

    # -- what adapters ask of their base (`adapters.base.Base`) ----------------------------------

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The module's map with another weight, without bias."""
        raise NotImplementedError

    def base_weight(self, name: str = "weight") -> Tensor:
        """A weight as it was before any merge, dense, in the canonical layout."""
        return self._kept[name] if name in self._kept else self.dense_weight(name)

    def bias_below(self, adapter: Adapter, name: str = "weight") -> Tensor | None:
        """The bias of the map that an adapter acts on: those before it may change it."""
        # A row has one adapter only.
        chain = self.applied_adapters(name) if self.row_adapters is None else []
        copy, others = split_copy(chain)
        bias_name = self.bias_name(name)
        bias = getattr(self, bias_name, None) if copy is None else copy.tensor(bias_name)
        if bias is None:
            return None
        base: Base = self if name == "weight" else WeightView(self, name)
        for other in others:
            if other is adapter:
                break
            after = other.transform_bias(bias, base)
            compiling = torch.compiler.is_compiling() and after is not bias
            bias = torch.where(other.applied, after, bias) if compiling else after
        return bias

    # -- forward ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output with the adapters that are applied."""
        if self.row_adapters is not None:
            x, args, kwargs = first_argument(self, args, kwargs)
            known = self.adapters if self._enabled else ()
            return forward_by_row(
                [
                    name if name is not None and name in known else None
                    for name in self.row_adapters
                ],
                x,
                lambda name, rows: self.run(self.adapters_of_row(name), rows, *args, **kwargs),
                self.base_type.__name__,
            )
        chain = self.applied_adapters()
        copy, others = split_copy(chain)
        if not others:  # whatever the module is called with
            return self.base_forward(copy, *args, **kwargs)
        x, args, kwargs = first_argument(self, args, kwargs)
        return self.run(chain, x, *args, **kwargs)

    def run(self, chain: list[Adapter], x: Any, *args: Any, **kwargs: Any) -> Any:
        """The output for input `x` with the adapters of `chain`."""
        copy, others = split_copy(chain)
        return compose(others, x, lambda z: self.base_forward(copy, z, *args, **kwargs), self)

    def base_forward(self, copy: ModulesToSaveCopy | None, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, or that of a trained copy in its place."""
        if copy is not None:
            return copy(*args, **kwargs)
        if self._instance_forward is not None:  # a forward patched onto the instance (accelerate)
            return self._instance_forward(*args, **kwargs)
        return super().forward(*args, **kwargs)  # the base type's

    def applied_adapters(self, name: str = "weight") -> list[Adapter]:
        """The adapters that act on a weight: active, enabled, and not already in it.

        While torch.compile traces, all of them: each is then switched by its tensor `applied`.
        """
        compiling = torch.compiler.is_compiling()
        if not (compiling or self._enabled):
            return []
        found = []
        for adapter_name in self.adapters if compiling else self.applied_names():
            part = part_of(self.adapters[adapter_name], name)
            if part is not None and part.applied.is_meta:
                if adapter_name not in self.applied_names():
                    continue
                self.check_filled(adapter_name)
            # A copy may answer in any structure: which one acts is compiled in.
            if isinstance(part, ModulesToSaveCopy) and adapter_name not in self.applied_names():
                continue
            if part is not None:
                found.append(part)
        return found

    def adapters_of_row(self, name: str | None) -> list[Adapter]:
        """The adapters of a row that goes through adapter `name` alone; None: through the base."""
        if name is None:
            return []
        part = part_of(self.adapters[name], "weight")
        if part is not None and part.applied.is_meta:
            self.check_filled(name)
        return [] if part is None else [part]

    def check_filled(self, name: str) -> None:
        """Refuse an adapter on the meta device, unless the module is there too, to find shapes.

        Torch itself may compute something from memory that nobody has written.

        Raises:
            AdapterStateError: Naming the adapter and what fills it.

        """
        own = {id(p) for p in self.adapters.parameters()}
        if any(not p.is_meta for p in self.parameters() if id(p) not in own):
            raise AdapterStateError(
                f"Adapter {name!r} is on the meta device and has no values yet "
                "(low_cpu_mem_usage): fill it with load_adapter_state_dict, or take it off and "
                "use load_adapter."
            )

    def applied_names(self) -> list[str]:
        """Names of the adapters that act in forward, in the order they were added."""
        if not self._enabled:
            return []
        return [n for n in self.adapters if n in self._active and n not in self._merged]

    # -- which adapters act ----------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part in forward."""
        return self._active

    @active_adapters.setter
    def active_adapters(self, names: list[str]) -> None:
        self._active = names
        self._tell_adapters()

    @property
    def adapters_enabled(self) -> bool:
        """False inside `disable_adapter`."""
        return self._enabled

    @adapters_enabled.setter
    def adapters_enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        self._tell_adapters()

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are in the weights at present."""
        return self._merged

    @merged_adapters.setter
    def merged_adapters(self, names: list[str]) -> None:
        self._merged = names
        self._tell_adapters()

    def _tell_adapters(self) -> None:
        applied = self.applied_names()
        for name in self.adapters:
            self.adapters[name].set_applied(name in applied)

    # -- merging ---------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, names: Iterable[str]) -> None:
        """Put the adapters `names` into the weights; what was there is kept aside.

        The fold of the adapters over the base weight, in at least fp32 and rounded once.

        Raises:
            AdapterStateError: If a result is not finite; nothing is changed then.

        """
        wanted = {*self._merged, *names}
        merging = [name for name in self.adapters if name in wanted and self.can_merge(name)]
        if merging == self._merged:
            return
        results: dict[str, Tensor] = {}
        for name in self.weight_shapes():
            parts = [part for n in merging if (part := part_of(self.adapters[n], name)) is not None]
            if parts:
                self._fold_weight(name, parts, results)
        for result in results.values():
            if not torch.isfinite(result).all():
                raise AdapterStateError(
                    f"Merging {merging} into a {type(self).__name__} gives values that are not "
                    "finite; nothing was merged into it. The adapter has diverged, or the dtype "
                    f"({result.dtype}) is too narrow."
                )
        for name, result in results.items():
            if name not in self._kept:
                self._kept[name] = self.keep(name)
            self.store_weight(result, name)
        self.merged_adapters = merging

    def can_merge(self, name: str) -> bool:
        """Whether there is something to merge: a trained copy already is a module of its own."""
        return not isinstance(self.adapters[name], ModulesToSaveCopy)

    def _fold_weight(self, name: str, parts: list[Adapter], results: dict[str, Tensor]) -> None:
        weight = self.base_weight(name)
        base: Base = self if name == "weight" else WeightView(self, name)
        start = total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with without_autocast(weight):  # which would narrow the products
            for part in parts:
                total = part.transform_weight(total, base)
            if total is not start:
                results[name] = total.to(weight.dtype)
            bias_name = self.bias_name(name)
            if getattr(self, bias_name, None) is None:
                return
            bias = self.base_weight(bias_name)
            unchanged = changed = bias.to(total.dtype)
            for part in parts:
                changed = part.transform_bias(changed, base)
            if changed is not unchanged:
                results[bias_name] = changed.to(bias.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the very weights that were there before the first merge, bit for bit."""
        for name, kept in self._kept.items():
            self.restore(kept, name)
        self._kept = {}
        self.merged_adapters = []

    def keep(self, name: str) -> Any:
        """What brings a parameter back bit for bit, as `base_weight` gives it."""
        return self.dense_weight(name).detach().clone()

    def store_weight(self, dense: Tensor, name: str) -> None:
        """Write a dense weight in the canonical layout."""
        self.dense_weight(name).copy_(dense)

    def restore(self, kept: Any, name: str) -> None:
        """Put back what `keep` gave."""
        self.store_weight(kept, name)

    def kept_tensors(self) -> dict[str, Tensor]:
        """The original of every parameter that a merge has written, in the parameter's layout."""
        return dict(self._kept)

    def forget_originals(self) -> None:
        """Let what is merged be the base from now on."""
        self._kept = {}
        self.merged_adapters = []

    # -- pickling --------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The dynamic class cannot be found by name: pickle what it is made of instead.
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new_adapted_layer, (self.layer_type, self.base_type), *reduced[2:])


class WeightView:
    """One weight of a layer that has several, as its adapters see it."""

    def __init__(self, layer: AdaptedLayer, name: str) -> None:
        self.layer = layer
        self.name = name

    @property
    def bias(self) -> Tensor | None:
        """The bias that goes with the weight."""
        return cast("Tensor | None", getattr(self.layer, self.layer.bias_name(self.name), None))

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's map with another weight, without bias."""
        return self.layer.apply_weight(x, weight)

    def base_weight(self) -> Tensor:
        """The weight before any merge, dense, in the canonical layout."""
        return self.layer.base_weight(self.name)

    def bias_below(self, adapter: Adapter) -> Tensor | None:
        """The bias of the map that an adapter on the weight acts on."""
        return self.layer.bias_below(adapter, self.name)


_CLASSES: dict[tuple[type[AdaptedLayer], type[nn.Module]], Any] = {}


def adapted_class(layer_type: type[AdaptedLayer], base_type: type[nn.Module]) -> Any:
    """The subclass of `base_type` that carries adapters; the same one every time."""
    if (layer_type, base_type) in _CLASSES:
        return _CLASSES[layer_type, base_type]
    namespace = {
        "__module__": layer_type.__module__,
        "__doc__": base_type.__doc__,
        "layer_type": layer_type,
        "base_type": base_type,
    }
    bases = (layer_type, base_type)
    return _CLASSES.setdefault(bases, type(f"Adapted{base_type.__name__}", bases, namespace))


def _new_adapted_layer(layer_type: type[AdaptedLayer], base_type: type[nn.Module]) -> Any:
    cls = adapted_class(layer_type, base_type)
    return cls.__new__(cls)


def first_argument(
    layer: AdaptedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(the input, the other positional, the other named arguments), also where it was named."""
    if args:
        return args[0], args[1:], kwargs
    name = list(inspect.signature(layer.base_type.forward).parameters)[1]  # after `self`
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}
