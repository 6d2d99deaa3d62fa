"""A module that carries adapters while it stays itself.

The module's `__class__` becomes a cached subclass of its own class (what
`torch.nn.utils.parametrize` and FSDP2 do too) and the module gains one child, `adapters`. So its
parameters keep their names, `isinstance` and `.weight` keep working, and taking the adapters off
restores exactly the class that was there. `conversion.py` does it.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterModule, BaseWeight, Convolution
from lora_lightning.adapters.modules_to_save import ModulesToSaveCopy, base_tensors_of
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.layers.dynamic_class import adapted_class
from lora_lightning.layers.loading import LoadableLayer
from lora_lightning.layers.mixed_batch import forward_by_row
from lora_lightning.layers.offloading import offloading_hook
from lora_lightning.layers.parametrized import reads_anew, reads_once, value
from lora_lightning.utilities.autocast import without_autocast


class AdaptedLayer(LoadableLayer):
    """Mixin of the dynamic subclass.

    The map of a layer is composed of the adapters that are applied, in the order in which they were
    added (see `adapters/base.py`). A kind of module says, in a file of its own, what its weights
    are, how they are read and written, and how they act on an input.
    """

    kind = "module"  # which adapter classes fit
    layer_type: type[AdaptedLayer]  # and base_type: what the dynamic class is made of
    weight: Tensor
    bias: Tensor | None
    _kept: dict[str, Any]  # what restores each written parameter, by its name

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Not handed on: what a module's class does with its subclasses (put them on a list, ask
        # for arguments, forbid them) is not meant for one that carries adapters.
        del cls, kwargs

    # -- what a kind of module says about itself -------------------------------------------------

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape, in the canonical layout, of every weight that an adapter can sit on, by name."""
        return {} if self.kind == "module" else {"weight": tuple(self.dense_weight().shape)}

    def convolution(self) -> Convolution | None:
        """The geometry, of a convolution."""
        return None

    def dense_weight(self, name: str = "weight") -> Tensor:
        """A weight as it is now, dense, in the canonical layout."""
        return cast(Tensor, value(self, name))

    def weight_dtype(self, name: str = "weight") -> torch.dtype:
        """The dtype that a weight's values have in the module's maths."""
        return cast(Tensor, value(self, name)).dtype

    def bias_name(self, name: str = "weight") -> str:
        """The parameter that holds the bias of a weight."""
        return "bias"

    def file_places(self, names: list[str]) -> dict[str, str]:
        """Return what PEFT's files put between path and tensors of each weight, by its name."""
        return dict.fromkeys(names, "")

    def peft_supports(self, adapter: AdapterModule) -> bool:
        """Tell whether PEFT computes the same from this adapter on this module."""
        return adapter.by_weight().keys() == {"weight"}

    def is_merged_exactly(self) -> bool:
        """Tell whether it is known that the output with merged adapters is that of before.

        A forward patched onto the instance may do anything with the weight.
        """
        return self._instance_forward is None

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the module's map to x with another weight, without bias."""
        raise NotImplementedError

    def base_weight(self, name: str = "weight") -> Tensor:
        """A weight as it was before any merge, dense, in the canonical layout."""
        if name in self._kept:
            return cast(Tensor, self._kept[name])
        now, base = self._parameters.get(name), base_tensors_of(self)._parameters.get(name)
        if now is base:
            return self.dense_weight(name)
        self._parameters[name] = base
        try:
            return self.dense_weight(name)
        finally:
            self._parameters[name] = now

    # -- forward ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's output with the adapters that are applied."""
        if self._in_patch:  # which calls `type(self).forward(self, x)`, as it did before adapters
            return super().forward(*args, **kwargs)
        self.check_recomputation(self.base_type.__name__)
        self.note_reached()
        of_rows = self._rows is not None and self.trains_in_place  # each of other tensors
        if reads_anew(self) and not of_rows:
            with reads_once():
                return self.forward_with_adapters(*args, **kwargs)
        if self._rows is not None:
            self.note_use()
            x, args, kwargs = first_argument(self, args, kwargs)
            known = [*self.adapters] if self._enabled else []
            return forward_by_row(
                [name if name in known else None for name in self._rows],
                x,
                lambda name, rows: self._forward_rows(name, rows, *args, **kwargs),
                self.base_type.__name__,
            )
        if not self.trains_in_place:
            return self._forward(self.applied_adapters(), args, kwargs)
        with self.computing():
            return self._forward(self.applied_adapters(), args, kwargs)

    def _forward(self, adapters: list[Adapter], args: Any, kwargs: Any) -> Any:
        if not adapters:  # whatever the module is called with
            return self.base_forward(*args, **kwargs)
        self.note_use()
        x, args, kwargs = first_argument(self, args, kwargs)
        return self.run(adapters, x, *args, **kwargs)

    def run(self, adapters: list[Adapter], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the output for `x` with `adapters` on the module's own map."""
        return compose(
            adapters, x, lambda z: self.base_forward(z, *args, **kwargs), WeightView(self)
        )

    def _forward_rows(self, name: str | None, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output for rows that go through adapter `name` alone; None: the base."""
        if name is None:
            return self.run([], x, *args, **kwargs)
        adapter = self.adapters[name]
        if adapter.applied.is_meta:
            self.check_filled(name)
        on_weight = [a for key, a in adapter.by_weight().items() if key == "weight"]
        with self.computing(adapter if isinstance(adapter, ModulesToSaveCopy) else None):
            return self.run(on_weight, x, *args, **kwargs)

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        if self._instance_forward is not None:  # a forward patched onto the instance (accelerate)
            self._in_patch = True
            try:
                return self._instance_forward(*args, **kwargs)
            finally:
                self._in_patch = False
        return super().forward(*args, **kwargs)  # the base type's

    # -- merging ---------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, names: Iterable[str]) -> None:
        """Put the adapters `names` into the weights; what was there is kept aside.

        The adapters are composed on the base weight in at least fp32 and rounded once.

        Raises:
            AdapterStateError: If a result is not finite; nothing is changed then.

        """
        wanted = {*self._merged, *names}
        merging = self._with_weights(wanted)
        if [*merging] == self._merged:
            return
        for name, result in self.merged_tensors(merging).items():
            if name not in self._kept:
                self._kept[name] = self.keep(name)
            self.store_weight(result, name)
        self.merged_adapters = [*merging]

    @torch.no_grad()
    def merged_tensors(
        self, names: Iterable[str], weights: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """What a merge of these adapters alone writes, in the canonical layout; nothing is written.

        Args:
            names: The adapters.
            weights: The weights that are wanted, and their biases; None: all.

        Raises:
            AdapterStateError: If a result is not finite.

        """
        merging = self._with_weights(names)
        results: dict[str, Tensor] = {}
        for name in self.weight_shapes() if weights is None else weights:
            adapters = [on_weight[name] for on_weight in merging.values() if name in on_weight]
            if adapters:
                self._merge_weight(name, adapters, results)
        for result in results.values():
            if not torch.isfinite(result).all():
                raise AdapterStateError(
                    f"Merging {[*merging]} into a {type(self).__name__} gives values that are not "
                    "finite; nothing was merged into it. The adapter has diverged, or the dtype "
                    f"({result.dtype}) is too narrow."
                )
        return results

    def _with_weights(self, names: Iterable[str]) -> dict[str, dict[str, Adapter]]:
        wanted = {*names}
        return {
            name: on_weight
            for name in self.adapters
            if name in wanted and (on_weight := self.adapters[name].by_weight())
        }

    def _merge_weight(self, name: str, adapters: list[Adapter], results: dict[str, Tensor]) -> None:
        weight, view = self.base_weight(name), WeightView(self, name)
        start = total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with without_autocast(weight):  # which would narrow the products
            for adapter in adapters:
                _check_is_weight(adapter, view)
                total = adapter.transform_weight(total, view)
            if total is not start:
                results[name] = total.to(weight.dtype)
            bias_name = self.bias_name(name)
            if view.bias is None:
                return
            bias = self.base_weight(bias_name)
            unchanged = changed = bias.to(total.dtype)
            for adapter in adapters:
                changed = adapter.transform_bias(changed, view)
            if changed is not unchanged:
                results[bias_name] = changed.to(bias.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the very weights that were there before the first merge, bit for bit."""
        if self._kept and offloading_hook(self) is not None:
            raise AdapterStateError(
                f"A {self.base_type.__name__} was offloaded (accelerate) after adapters had been "
                "merged into it, and what was there before cannot be put back. Take the hooks off "
                "first: accelerate.hooks.remove_hook_from_module(model, recurse=True)."
            )
        for name, kept in self._kept.items():
            self.restore(kept, name)
        self.forget_originals()

    def keep(self, name: str) -> Any:
        """Return what brings a parameter back bit for bit, as `base_weight` gives it."""
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
        """Make what is merged the base from now on."""
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
    """One weight of a layer as the adapters on it see it (`adapters.base.BaseWeight`)."""

    def __init__(self, layer: AdaptedLayer, name: str = "weight") -> None:
        self.layer: nn.Module = layer
        self._layer = layer
        self._name = name

    @property
    def bias(self) -> Tensor | None:
        """The bias that goes with the weight."""
        return cast("Tensor | None", value(self._layer, self._layer.bias_name(self._name)))

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the layer's map to x with another weight, without bias."""
        return self._layer.apply_weight(x, weight)

    def base_weight(self) -> Tensor:
        """Return the weight before any merge, dense, in the canonical layout."""
        return self._layer.base_weight(self._name)

    def weight_below(self, adapter: Adapter) -> Tensor:
        """Return the weight that `adapter` acts on, in at least fp32 where others changed it."""
        weight = self._layer.dense_weight(self._name)
        for other in self._below(adapter):
            _check_is_weight(other, self)
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight = other.if_applied(other.transform_weight(wide, self), wide)
        return weight

    def bias_below(self, adapter: Adapter) -> Tensor | None:
        """Return the bias of the map that `adapter` acts on: those before it may change it."""
        bias = self.bias
        if bias is None:
            return None
        for other in self._below(adapter):
            bias = other.if_applied(other.transform_bias(bias, self), bias)
        return bias

    def _below(self, adapter: Adapter) -> list[Adapter]:
        below: list[Adapter] = []
        for other in self._layer.applied_adapters(self._name):  # none where rows have one each
            if other is adapter:
                break
            below.append(other)
        return below


def _check_is_weight(adapter: Adapter, base: BaseWeight) -> None:
    reason = adapter.why_no_weight(base.bias is not None)
    if reason is not None:
        raise AdapterStateError(
            f"{adapter.spec.path!r} cannot be merged: {reason}. Keep the adapter unmerged, or "
            "leave this layer out with exclude_modules. (lora.exclude_modules)"
        )


def compose(
    adapters: list[Adapter], x: Tensor, base_map: Callable[[Tensor], Any], base: BaseWeight
) -> Any:
    """Return the output of `base_map` with `adapters` around it, the first one innermost."""
    inputs = []
    for adapter in reversed(adapters):
        inputs.append(x)
        x = adapter.if_applied(adapter.transform_input(x, base), x)
    y = base_map(x)
    if not isinstance(y, Tensor) and adapters:
        name = adapters[0].spec.path
        raise TargetError(
            f"{name!r} ({type(base.layer).__name__.removeprefix('Adapted')}) returned a "
            f"{type(y).__name__}, not a tensor: there is nothing that its adapter's output could "
            f"be added to. Leave it out: exclude_modules: [{name!r}]. (lora.exclude_modules)"
        )
    for adapter, given in zip(adapters, reversed(inputs), strict=True):
        y = adapter.if_applied(adapter(given, y, base), y)
    return y


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
