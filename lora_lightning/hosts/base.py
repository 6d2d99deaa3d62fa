"""How an adapter grows on a module while the module stays itself.

The module's `__class__` becomes a cached subclass of its own class (what
`torch.nn.utils.parametrize` and FSDP2 do too) and the module gains one child, `adapters`. So its
parameters keep their names, `isinstance` and `.weight` keep working, and taking the adapters off
restores exactly the class that was there.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterDict, DeltaAdapter
from lora_lightning.adapters.trained_copy import TrainedCopy
from lora_lightning.errors import AdapterStateError, TargetError


class Host(nn.Module):
    """Mixin of the dynamic subclass: a module that carries adapters.

    Attributes:
        adapters: The adapters by name.
        active_adapters: Names of those that take part in forward, in order.
        adapters_enabled: False inside `disable_adapter`.
        merged_adapters: Names of those that are added into the weight at present.

    """

    kind = "module"  # which adapter class fits, a key of adapters.LORA_BY_KIND
    host_type: type[Host]  # these two: what the dynamic class is made of
    base_type: type[nn.Module]
    weight: nn.Parameter  # of every kind that carries deltas
    adapters: AdapterDict
    active_adapters: list[str]
    adapters_enabled: bool
    merged_adapters: list[str]
    _unmerged_weight: Tensor | None
    _instance_forward: Any

    @staticmethod
    def dimensions(module: nn.Module) -> tuple[int, int]:
        """(in, out) sizes of the adapter that fits `module`; only kinds with an adapter have it."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A module of no special kind: only trained copies can sit here."""
        return self.base_forward(self.live_adapters(), *args, **kwargs)

    def base_forward(self, live: list[Adapter], *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, or that of a live trained copy, which replaces it."""
        for adapter in live:
            if isinstance(adapter, TrainedCopy):
                return adapter(*args, **kwargs)
        if self._instance_forward is not None:  # a forward patched onto the instance (accelerate)
            return self._instance_forward(*args, **kwargs)
        return super().forward(*args, **kwargs)  # the base type's

    def live_adapters(self) -> list[Adapter]:
        """The adapters that act in forward: active, enabled, and not already in the weight."""
        if not self.adapters_enabled:
            return []
        merged = self.merged_adapters
        return [self.adapters[n] for n in self.active_adapters if n not in merged]

    def weight_delta(self, adapter: DeltaAdapter) -> Tensor:
        """The adapter's delta in the layout of this module's `weight`."""
        return adapter.delta_weight()

    @torch.no_grad()
    def merge(self, names: Iterable[str]) -> None:
        """Add the deltas of `names` to the weight; the weight itself is kept aside.

        weight = W + sum of deltas, summed in at least fp32 and rounded once.

        Raises:
            AdapterStateError: If the result is not finite; the weight is then unchanged.

        """
        new = [
            name
            for name in names
            if name in self.adapters
            and name not in self.merged_adapters
            and isinstance(self.adapters[name], DeltaAdapter)
        ]
        if not new:
            return
        weight = self.weight
        base = weight.detach().clone() if self._unmerged_weight is None else self._unmerged_weight
        total = base.to(torch.promote_types(base.dtype, torch.float32))
        with torch.autocast(weight.device.type, enabled=False):  # which would narrow B A
            for name in [*self.merged_adapters, *new]:
                total = total + self.weight_delta(cast(DeltaAdapter, self.adapters[name])).to(total)
        total = total.to(weight.dtype)
        if not torch.isfinite(total).all():
            raise AdapterStateError(
                f"Merging {new} into a {type(self).__name__} gives values that are not finite; "
                "nothing was merged into it. The adapter has diverged, or the weight's dtype "
                f"({weight.dtype}) is too narrow."
            )
        weight.copy_(total)
        self._unmerged_weight = base
        self.merged_adapters = [*self.merged_adapters, *new]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the very weight that was there before the first merge, bit for bit."""
        if self._unmerged_weight is not None:
            self.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters = []

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The dynamic class cannot be found by name: pickle what it is made of instead.
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new_host, (self.host_type, self.base_type), *reduced[2:])


_CLASSES: dict[tuple[type[Host], type[nn.Module]], Any] = {}


def adapted_class(host_type: type[Host], base_type: type[nn.Module]) -> Any:
    """The subclass of `base_type` that carries adapters; the same one every time."""
    if (host_type, base_type) in _CLASSES:
        return _CLASSES[host_type, base_type]
    namespace = {
        "__module__": host_type.__module__,
        "__doc__": base_type.__doc__,
        "host_type": host_type,
        "base_type": base_type,
    }
    bases = (host_type, base_type)
    return _CLASSES.setdefault(bases, type(f"Adapted{base_type.__name__}", bases, namespace))


def _new_host(host_type: type[Host], base_type: type[nn.Module]) -> Any:
    cls = adapted_class(host_type, base_type)
    return cls.__new__(cls)


def check_can_grow(module: nn.Module, path: str, option: str = "target_modules") -> None:
    """Refuse modules whose class cannot be swapped, before anything is touched.

    Raises:
        TargetError: Naming `path` and the reason.

    """
    if isinstance(module, Host):
        return
    if isinstance(module, torch.jit.ScriptModule):
        reason = (
            "is a scripted module: its compiled code cannot be extended. Adapt it before torch.jit"
        )
    elif hasattr(module, "adapters"):
        reason = "already has an attribute `adapters` of its own, where adapters would live"
    elif isinstance(getattr(module, "weight", None), nn.parameter.UninitializedParameter):
        reason = "is lazy and has no size yet. Run one batch through the model first"
    else:
        return
    raise TargetError(f"{path!r} ({type(module).__name__}) {reason}. (lora.{option})")


def grow(module: nn.Module, host_type: type[Host], name: str, adapter: Adapter) -> None:
    """Put `adapter` on `module` under `name`, inactive; the first one swaps the module's class."""
    if not isinstance(module, Host):
        instance_forward = module.__dict__.pop("forward", None)
        module.__class__ = adapted_class(host_type, type(module))
        host = cast(Host, module)
        host.adapters = AdapterDict()
        host.active_adapters = []
        host.adapters_enabled = True
        host.merged_adapters = []
        host._unmerged_weight = None
        host._instance_forward = instance_forward
    adapter.train(module.training)
    cast(Host, module).adapters[name] = adapter


_STATE = (
    "active_adapters",
    "adapters_enabled",
    "merged_adapters",
    "_unmerged_weight",
    "_instance_forward",
)


def check_can_shrink(module: Host, path: str) -> None:
    """Refuse modules whose class was swapped again on top of ours, before anything is touched.

    Raises:
        AdapterStateError: Naming `path`.

    """
    if type(module) is not adapted_class(module.host_type, module.base_type):
        raise AdapterStateError(
            f"{path!r} ({type(module).__name__}) was wrapped by other code after its adapters "
            "were added; take that wrapping off first, then the adapters."
        )


def shrink(module: Host, name: str) -> None:
    """Take adapter `name` off; the last one gives the module its own class back."""
    del module.adapters[name]
    module.active_adapters = [active for active in module.active_adapters if active != name]
    if module.adapters:
        return
    base_type = module.base_type
    instance_forward = module._instance_forward
    for attribute in _STATE:
        del module.__dict__[attribute]
    del module.adapters
    module.__class__ = base_type  # type: ignore[assignment]
    if instance_forward is not None:
        module.forward = instance_forward  # type: ignore[method-assign]


def first_argument(
    host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(the input, the other positional, the other named arguments), also where it was named."""
    if args:
        return args[0], args[1:], kwargs
    name = list(inspect.signature(host.base_type.forward).parameters)[1]  # after `self`
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without what is inside adapters."""
    skipped: str | None = None
    for path, module in model.named_modules():
        if skipped is not None and path.startswith(skipped):
            continue
        if isinstance(module, AdapterDict):
            skipped = path + "."
            continue
        yield path, module


def named_hosts(model: nn.Module) -> Iterator[tuple[str, Host]]:
    """Every module of `model` that carries adapters, by path."""
    for path, module in walk(model):
        if isinstance(module, Host):
            yield path, module


def adapter_owners(model: nn.Module) -> dict[int, str]:
    """Path of the host by `id` of every parameter that its adapters own."""
    return {id(p): path for path, host in named_hosts(model) for p in host.adapters.parameters()}
