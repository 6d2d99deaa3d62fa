"""`nn.Linear` and its subclasses as hosts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.base import DeltaAdapter
from lora_lightning.hosts.base import Host, first_argument
from lora_lightning.hosts.shared_cast import autocast_input


class LinearHost(Host):
    """y = W x + b + sum of the live adapters' shares; weight (out_features, in_features)."""

    kind = "linear"

    @staticmethod
    def dimensions(module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features)."""
        out_features, in_features = module.weight.shape  # type: ignore[misc]
        return in_features, out_features

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus the live adapters' shares."""
        live = self.live_adapters()
        if not live:
            return self.base_forward(live, *args, **kwargs)
        x, args, kwargs = first_argument(self, args, kwargs)
        shared = autocast_input(x)
        # Only the plain Linear is known to begin with autocast's cast; a subclass with a forward
        # of its own (a router in fp32, say) gets what it was given.
        plain = self.base_type.forward is nn.Linear.forward and self._instance_forward is None
        y = self.base_forward(live, shared if plain else x, *args, **kwargs)
        for adapter in live:
            if isinstance(adapter, DeltaAdapter):
                y = adapter(shared, y)
        return y
