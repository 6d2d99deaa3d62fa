"""Names without what torch.compile and FSDP1 put into them when they wrap a module.

The wrapper that torch.compile returns holds the module as its child `_orig_mod`, so "net.weight"
becomes "net._orig_mod.weight" in every state dict. Targets, saved keys and fingerprints leave that
part out: a compiled run resumes from the checkpoint of one that was not compiled, and the other way
round. FSDP1 and its activation checkpointing wrap modules likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import nn

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A path or key as it is without wrappers."""
    if not any(wrapped in name for wrapped in WRAPPED):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def is_wrapper(module: object) -> TypeGuard[nn.Module]:
    """True for what torch.compile returned for a module, or FSDP1."""
    return isinstance(module, nn.Module) and any(name in module._modules for name in WRAPPED)


def unwrapped(module: Any) -> Any:
    """The module inside such wrappers; everything else is returned as it is."""
    while is_wrapper(module):
        module = next(module._modules[name] for name in WRAPPED if name in module._modules)
    return module


def under_own_names(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` under the names that `model.state_dict()` has, as `load_state_dict` needs it."""
    # Not the model's own `state_dict`, which may leave out or rename what it likes.
    own = {plain_name(name): name for name in nn.Module.state_dict(model)}
    return {own.get(plain_name(name), name): value for name, value in state.items()}
