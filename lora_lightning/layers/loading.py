"""What `load_state_dict` brings goes to the base, and to adapters, whatever acts at the moment.

A module that holds trained tensors in the base's places takes the base's meanwhile, and one that
has adapters merged into its weights is unmerged, loaded and merged again. Only the very values that
the merged weights have are taken for what `state_dict` gave of them, and change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.layers.in_place import take
from lora_lightning.layers.instance_forward import PatchableLayer
from lora_lightning.utilities.dtensor import is_sharded


class LoadableLayer(PatchableLayer):
    """The part of an adapted layer that is loaded."""

    _merge_again: list[str]  # while a state is loaded: what was merged before

    def merge(self, names: Iterable[str]) -> None:
        """Put the adapters `names` into the weights."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Put back the weights of before."""
        raise NotImplementedError

    def kept_tensors(self) -> dict[str, Tensor]:
        """The original of every parameter that a merge has written."""
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        names = list(self.merged_adapters)
        if names and self._has_other_weights(state_dict, prefix):
            self.unmerge()
            self._merge_again = names
        self.show_base()
        # Called when what is inside is loaded as well; taken off with the adapters.
        if end_load not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(end_load)  # type: ignore[no-untyped-call]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _has_other_weights(self, state: Mapping[str, Any], prefix: str) -> bool:
        return any(
            not _is_same(state[prefix + name], getattr(self, name))
            for name in self.kept_tensors()
            if prefix + name in state
        )


def end_load(layer: LoadableLayer, incompatible_keys: object) -> None:
    """Show again what acts, and merge again what was merged."""
    if layer.trains_in_place:
        take(layer, layer.original_tensors, layer.original_tensors)
        layer.show_active()
    names, layer._merge_again = layer._merge_again, []
    layer.merge(names)


def forget_load(module: nn.Module) -> None:
    """Undo the registration of `end_load`."""
    hooks = module._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is end_load]:
        del hooks[key]


def _is_same(new: object, own: Tensor) -> bool:
    if not isinstance(new, Tensor) or new.shape != own.shape or is_sharded(own) or own.is_meta:
        return False
    return torch.equal(new.to(device=own.device, dtype=own.dtype), own)
