"""transformers' `Conv1D` as a host: a Linear whose weight is stored (in, out), as in GPT-2."""

from __future__ import annotations

from torch import Tensor, nn

from lora_lightning.adapters.base import DeltaAdapter
from lora_lightning.hosts.linear import LinearHost


class Conv1DHost(LinearHost):
    """y = x W + b + sum of the live adapters' shares; weight (in_features, out_features)."""

    @staticmethod
    def dimensions(module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features)."""
        in_features, out_features = module.weight.shape  # type: ignore[misc]
        return in_features, out_features

    def weight_delta(self, adapter: DeltaAdapter) -> Tensor:
        """The delta, transposed like the weight."""
        return adapter.delta_weight().t()


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, found without importing transformers."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        for base in type(module).__mro__
    )
