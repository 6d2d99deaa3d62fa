"""A module whose forward makes of its weight what no adapter can know: the adapters change it.

y = f(x; W'), with f the module's own forward and W' what the adapters make of the weight W, in at
least fp32 and rounded once. So the output is by construction that of merged adapters. f may
standardise its weight (BiT), look up rows by something else than ids (the positions of Whisper and
OPT), or end in an activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter, AdapterModule
from lora_lightning.errors import AdapterStateError, ConfigError
from lora_lightning.layers.base import AdaptedLayer, WeightView
from lora_lightning.layers.covered import covered
from lora_lightning.utilities.autocast import without_autocast

_OF_INPUTS = ("lora_dropout", "rank_dropout", "module_dropout")


class AdaptedByWeight(AdaptedLayer):
    """y = f(x; W'); f takes any arguments."""

    def check_adapter(self, adapter: AdapterModule, path: str) -> None:
        """Refuse what is not a change of the weight.

        Raises:
            ConfigError: Naming the option, or the reason.

        """
        name = self.base_type.__name__
        for option in _OF_INPUTS:
            if getattr(adapter.config, option, 0):
                raise ConfigError(
                    f"{option} is set, but {path!r} ({name}) has a forward of its own that is no "
                    "plain product of input and weight: adapters change its weight there, and "
                    f"{option} is not defined for that. Set it to 0, or leave this layer out with "
                    f"exclude_modules. (lora.{option})"
                )
        for on_weight in adapter.by_weight().values():
            reason = on_weight.why_no_weight(WeightView(self).bias is not None)
            if reason is not None:
                raise ConfigError(
                    f"{path!r} ({name}) has a forward of its own that is no plain product of input "
                    f"and weight: adapters change its weight there, but {reason}. Leave this layer "
                    "out. (lora.exclude_modules)"
                )

    def peft_supports(self, adapter: AdapterModule) -> bool:
        """False: PEFT adds to what the forward answers."""
        return False

    def is_merged_exactly(self) -> bool:
        """True: the output is that of merged adapters anyway."""
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, which reads W'."""
        self.check_recomputation(self.base_type.__name__)
        self.note_reached()
        for name in self._rows or ():
            if name is not None and name in self.adapters and self._enabled:
                raise AdapterStateError(
                    f"adapters_per_row names adapter {name!r}, which changes the weight of a "
                    f"{self.base_type.__name__} with a forward of its own: rows share it. Run the "
                    "rows of each adapter as a batch of their own."
                )
        with self.computing():
            adapters = self.applied_adapters()
            if not adapters:
                return self.base_forward(*args, **kwargs)
            self.note_use()
            with covered(self, self._changed(adapters)):
                return self.base_forward(*args, **kwargs)

    def _changed(self, adapters: list[Adapter]) -> dict[str, Tensor]:
        weight, view = self.weight, WeightView(self)
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with without_autocast(weight):
            for adapter in adapters:
                total = adapter.if_applied(adapter.transform_weight(total, view), total)
            changed = {"weight": total.to(weight.dtype)}
            bias: Tensor | None = getattr(self, "bias", None)
            if bias is not None:
                after = bias.to(total.dtype)
                for adapter in adapters:
                    after = adapter.if_applied(adapter.transform_bias(after, view), after)
                changed["bias"] = after.to(bias.dtype)
        return changed
