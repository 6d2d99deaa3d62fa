"""Close the one road of torch that reads weights past the modules that own them.

In eval mode `nn.TransformerEncoderLayer` hands the weights of its children straight to a fused
kernel and never calls the children: adapters on them would be bypassed in silence. Torch takes
its ordinary path where `activation_relu_or_gelu` is 0 (and `use_nested_tensor` false, on the
encoder), and that is all these functions touch.
"""

from __future__ import annotations

from torch import nn

from lora_lightning.layers.base import AdaptedLayer

_SWITCHES = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_KEPT = "_fast_path_before_adapters"


def close_fast_path(model: nn.Module) -> None:
    """Make every encoder layer that holds a layer call its children."""
    for module, switch, closed in _encoders(model):
        if _KEPT not in module.__dict__ and any(
            isinstance(child, AdaptedLayer) for child in module.modules()
        ):
            module.__dict__[_KEPT] = getattr(module, switch)
            setattr(module, switch, closed)


def reopen_fast_path(model: nn.Module) -> None:
    """Undo `close_fast_path`."""
    for module, switch, _ in _encoders(model):
        if _KEPT in module.__dict__:
            setattr(module, switch, module.__dict__.pop(_KEPT))


def _encoders(model: nn.Module) -> list[tuple[nn.Module, str, object]]:
    return [
        (module, switch, closed)
        for module in model.modules()
        for kind, switch, closed in _SWITCHES
        if isinstance(module, kind)
    ]
