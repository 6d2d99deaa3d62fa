"""Modules whose adapters sit on parameters: the fused experts of a mixture, or any matrix.

The adapters of other layers act on what a module answers; here they act on what it reads. While the
module's own forward runs, its adapted parameters are covered by attributes of the same names that
stand for W + delta. The parameters themselves are never touched.

For transformers' experts ("eager", "batched_mm" and "grouped_mm" alike) that is a `LowRankWeight`,
and the sum is never made. Code that is not known to read its weights by torch operations alone (a
kernel of its own, a forward that somebody patched) gets the sum: right everywhere, and as costly
as a second set of weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterModule
from lora_lightning.adapters.lora.experts import LoraExpertsAdapter
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.layers.base import AdaptedLayer, WeightView
from lora_lightning.layers.covered import covered
from lora_lightning.layers.low_rank_weight import LowRankWeight
from lora_lightning.layers.multihead_attention import attention_obstacle
from lora_lightning.utilities.autocast import without_autocast

# Packages in which a forward reads its weights by torch operations alone, and those of
# transformers' experts implementations that do.
LOW_RANK_PACKAGES = ("transformers.models.", "torch.nn.modules.")
_IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm")


class AdaptedExperts(AdaptedLayer):
    """A module with adapted parameters: (experts, out, in), (experts, in, out) or (out, in).

    Its adapters are `MultiWeightAdapter` with a part for each adapted parameter, under its name.
    """

    kind = "experts"

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of two or three dimensions, adapted or not."""
        return {
            name: tuple(parameter.shape)
            for name, parameter in self._parameters.items()
            if parameter is not None and parameter.dim() in (2, 3)
        }

    def bias_name(self, name: str = "weight") -> str:
        """None: an adapter changes its own parameter only."""
        return ""

    def file_places(self, names: list[str]) -> dict[str, str]:
        """PEFT wraps one parameter after the other, so that the last one is outermost."""
        order = [name for name in self._parameters if name in names]
        return {name: "base_layer." * (len(order) - 1 - i) for i, name in enumerate(order)}

    def peft_supports(self, adapter: AdapterModule) -> bool:
        """Tell whether the adapter is LoRA, which PEFT has on parameters."""
        return all(isinstance(a, LoraExpertsAdapter) for a in adapter.by_weight().values())

    # -- forward ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, which reads W + delta."""
        self.note_reached()
        if torch.compiler.is_compiling() and self._breaks_graph():
            return self._forward_uncompiled(*args, **kwargs)
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.check_recomputation(self.base_type.__name__)
        self._check_rows()
        with self.computing():
            return self._forward_covered(*args, **kwargs)

    def _forward_covered(self, *args: Any, **kwargs: Any) -> Any:
        covers = {}
        for name in self._adapted_names():
            adapters = self.applied_adapters(name)
            if adapters:
                weight = self._parameters.get(name)  # past a cover, where forward calls itself
                weight = getattr(self, name) if weight is None else weight
                covers[name] = self._cover(name, weight, adapters)
        if not covers:
            return self.base_forward(*args, **kwargs)
        self.note_use()
        with covered(self, covers):
            return self.base_forward(*args, **kwargs)

    _forward_uncompiled = torch.compiler.disable(_forward)

    def _breaks_graph(self) -> bool:
        # "eager" loops over the experts that the data chose. In bfloat16 "grouped_mm" calls
        # `torch._grouped_mm`, the one product for which torch.compile ignores __torch_function__;
        # a graph break there costs less than the sum.
        shapes = self.weight_shapes()
        stacks = [name for name in self._adapted_names() if len(shapes[name]) == 3]
        if not stacks or not self._reads_by_torch_operations():
            return False
        return self._implementation() == "eager" or (
            self._implementation() == "grouped_mm"
            and self.weight_dtype(stacks[0]) == torch.bfloat16
        )

    def _adapted_names(self) -> list[str]:
        names: dict[str, None] = {}
        for adapter in self.adapters.values():
            names.update(dict.fromkeys(adapter.by_weight()))
        return list(names)

    def _cover(self, name: str, weight: Tensor, adapters: list[Adapter]) -> Any:
        """Return what stands for a weight with `adapters` on it."""
        if not all(isinstance(adapter, LoraExpertsAdapter) for adapter in adapters):
            return self._transformed(name, weight, adapters)
        lefts, rights = [], []
        for adapter in cast("list[LoraExpertsAdapter]", adapters):
            left, right = adapter.stored_factors()
            if torch.compiler.is_compiling():
                left = torch.where(adapter.applied != 0, left, 0)
            lefts.append(left.to(weight.dtype))
            rights.append(right.to(weight.dtype))
        left = torch.cat(lefts, dim=-1) if len(adapters) > 1 else lefts[0]
        right = torch.cat(rights, dim=-2) if len(adapters) > 1 else rights[0]
        shape = (*left.shape[:-1], right.shape[-1])
        if shape != tuple(weight.shape):
            raise AdapterStateError(
                f"The parameter {name!r} of a {self.base_type.__name__} has the shape "
                f"{tuple(weight.shape)}, but its adapter was made for {shape}. Add adapters after "
                "the model has been sharded or resized."
            )
        low_rank = LowRankWeight(weight, left.contiguous(), right.contiguous())
        return low_rank if self._reads_by_torch_operations() else low_rank.dense()

    def _transformed(self, name: str, weight: Tensor, adapters: list[Adapter]) -> Tensor:
        view = WeightView(self, name)
        with without_autocast(weight):
            for adapter in adapters:
                weight = adapter.if_applied(adapter.transform_weight(weight, view), weight)
        return weight

    def _reads_by_torch_operations(self) -> bool:
        return (
            self._instance_forward is None
            and self.base_type.forward.__module__.startswith(LOW_RANK_PACKAGES)
            and self._implementation() in _IMPLEMENTATIONS
        )

    def _implementation(self) -> Any:
        return getattr(getattr(self, "config", None), "_experts_implementation", None)

    def _check_rows(self) -> None:
        for name in self._rows or ():
            if name is not None and name in self.adapters and self._enabled:
                raise AdapterStateError(
                    f"adapters_per_row names adapter {name!r}, which sits on parameters of a "
                    f"{self.base_type.__name__}: experts mix the rows of a batch. Run the rows of "
                    "each adapter as a batch of their own."
                )


def check_parameter(module: nn.Module, path: str, name: str) -> None:
    """Refuse a parameter of the module at `path` that cannot carry an adapter.

    Raises:
        TargetError: Naming the parameter and the reason.

    """
    parameter = module._parameters[name]
    layer_type = module.layer_type if isinstance(module, AdaptedLayer) else AdaptedLayer
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        reason = "is lazy and has no size yet. Run one batch through the model first"
    elif parameter is None or parameter.dim() not in (2, 3):
        found = "is None" if parameter is None else f"has the shape {tuple(parameter.shape)}"
        reason = f"{found}; an adapter fits a matrix or a stack of matrices"
    elif not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        reason = f"is of {parameter.dtype}, to which no update can be added"
    elif isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        reason = "lies in a list that is never called itself: an adapter there would have no effect"
    elif isinstance(module, nn.MultiheadAttention) and attention_obstacle(module) is None:
        reason = "belongs to an attention, which target_modules adapts: name it there"
    elif isinstance(module, nn.RNNBase):
        reason = "is read past its name by its module: an adapter there would have no effect"
    elif layer_type not in (AdaptedLayer, AdaptedExperts):
        reason = f"belongs to a module that carries adapters of kind {layer_type.kind!r} already"
    else:
        return
    kind = (module.base_type if isinstance(module, AdaptedLayer) else type(module)).__name__
    raise TargetError(f"'{path}.{name}' (of a {kind}) {reason}. (lora.target_parameters)")
