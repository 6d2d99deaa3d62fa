"""transformers' `Conv1D` as a layer: a Linear whose weight is stored (in, out), as in GPT-2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.layers.linear import AdaptedLinear
from lora_lightning.utilities.is_a import is_a

_MODULE = "transformers.pytorch_utils"


class AdaptedConv1D(AdaptedLinear):
    """y = x W + b, weight stored (in_features, out_features), canonical its transpose."""

    def dense_weight(self, name: str = "weight") -> Tensor:
        """A view of the weight as (out_features, in_features)."""
        tensor: Tensor = getattr(self, name)
        return tensor.t()

    def is_merged_exactly(self) -> bool:
        """True where the forward is that of Conv1D."""
        own = self.base_type.forward.__module__ != _MODULE
        return not own and self._instance_forward is None

    def kept_tensors(self) -> dict[str, Any]:
        """The originals in the stored layout."""
        return {name: kept.t() for name, kept in self._kept.items()}


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether `module` is transformers' Conv1D, found without importing transformers."""
    return is_a(module, "Conv1D", module=_MODULE)
