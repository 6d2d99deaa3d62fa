"""`nn.Linear` and its subclasses as layers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterModule
from lora_lightning.adapters.shira import ShiraAdapter
from lora_lightning.adapters.trainable_tokens import (
    TiedTrainableTokensAdapter,
    TrainableTokensAdapter,
)
from lora_lightning.layers.autocast_cache import autocast_input
from lora_lightning.layers.base import AdaptedLayer, WeightView, compose
from lora_lightning.layers.by_weight import AdaptedByWeight
from lora_lightning.layers.fused_lora import add_lora, can_fuse, fused_lora, lora_terms
from lora_lightning.layers.own_forward import answers_by_rows, has_own_forward

_FORWARD = nn.Linear.forward  # torch's: others exchange it on the class, too


class AdaptedLinear(AdaptedLayer):
    """y = W x + b, weight (out_features, in_features)."""

    kind = "linear"

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product x weight^T."""
        return F.linear(x, weight)

    def run(self, adapters: list[Adapter], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output for `x`, which under autocast is cast once for all that read it."""
        shared = autocast_input(x)
        # The fused function has no gradient for a weight that trains itself.
        frozen = not self.trains_in_place or not self.weight.requires_grad
        terms = lora_terms(adapters) if frozen and can_fuse(shared) else None
        if terms and self.is_plain() and can_fuse(shared, self.weight, self.bias):
            return fused_lora(shared, self.weight, self.bias, terms)
        # Only the plain Linear is known to begin with autocast's cast; a subclass with a forward
        # of its own (a router in fp32, say) gets what it was given.
        own = shared if self.is_plain() else x

        def base_map(z: Tensor) -> Any:
            return self.base_forward(own if z is shared else z, *args, **kwargs)

        # Where the output has to be copied for it, adding is no faster than the plain expression.
        if terms and self.gives_output_away():
            y = base_map(shared)
            if can_fuse(y):
                return add_lora(shared, y, terms, inplace=True)
            return compose(adapters, shared, lambda z: y, WeightView(self))
        return compose(adapters, shared, base_map, WeightView(self))

    def gives_output_away(self) -> bool:
        """Tell whether the base needs its output no more, so that it may be written into."""
        return False

    def peft_supports(self, adapter: AdapterModule) -> bool:
        """Tell whether PEFT has it.

        It computes SHiRA past a forward that is not nn.Linear's, and forgets the bias of a head of
        which single rows train.
        """
        past = any(isinstance(a, ShiraAdapter) for a in adapter.by_weight().values())
        rows = isinstance(adapter, (TrainableTokensAdapter, TiedTrainableTokensAdapter))
        if rows and WeightView(self).bias is not None:
            return False
        return super().peft_supports(adapter) and not (past and not self.is_merged_exactly())

    def is_merged_exactly(self) -> bool:
        """True where the forward is that of nn.Linear; that of others has to be tried."""
        return self.is_plain()

    def is_plain(self) -> bool:
        """Tell whether the base's forward is that of nn.Linear itself."""
        return self.base_type.forward is _FORWARD and self._instance_forward is None


class AdaptedLinearByWeight(AdaptedByWeight, AdaptedLinear):
    """y = f(x; W'): a Linear whose forward answers in another shape than (..., out_features)."""


def is_linear_by_weight(module: nn.Module) -> bool:
    """Tell whether the output of a Linear is not what an update could be added to."""
    if isinstance(module, AdaptedLayer):
        return isinstance(module, AdaptedByWeight)
    return has_own_forward(type(module), nn.Linear) and not answers_by_rows(module)
