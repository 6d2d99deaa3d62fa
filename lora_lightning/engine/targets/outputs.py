"""Linears whose forward gives no tensor (routers of Llama 4 and PhiMoE), to which nothing adds.

They are told by a try before the model runs: a copy of the layer on the meta device, which has no
memory, is called. Where that cannot be done, the annotation of its forward is read; where it has
none, the layer itself refuses at its first forward (`layers/base.py`).
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import cast, get_origin

import torch
from torch import Tensor, nn

from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.instance_forward import instance_patch


def output_obstacle(module: nn.Module) -> str | None:
    """Why nothing can be added to what `module` returns; None where it can, or is not known."""
    if isinstance(module, AdaptedLayer) or not _has_own_forward(module):
        return None
    try:
        found = list(_outputs(module))
    except Exception:  # the user's own code, on a tensor that it may not take
        return _annotated(module)
    wrong = [output for output in found if not isinstance(output, Tensor)]
    return f"its forward returns a {type(wrong[0]).__name__}, not a tensor" if wrong else None


def _annotated(module: nn.Module) -> str | None:
    annotation = inspect.signature(type(module).forward).return_annotation
    kind = annotation if isinstance(annotation, str) else str(get_origin(annotation) or annotation)
    found = re.match(r"(?:<class ')?(?:typing\.)?(tuple|list|dict)\b", kind, re.IGNORECASE)
    return f"its forward returns a {found[1].lower()}, not a tensor" if found else None


def _has_own_forward(module: nn.Module) -> bool:
    """True if it is a Linear whose class runs other code than torch's."""
    if isinstance(module, torch.jit.ScriptModule) or instance_patch(module) is not None:
        return False  # what is patched onto the module itself cannot be called on a copy
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _outputs(module: nn.Module) -> Iterator[object]:
    """What `forward` gives in train mode and in eval mode."""
    dtype = module.weight.dtype if isinstance(module.weight, Tensor) else None
    x = torch.zeros(2, cast(int, module.in_features), dtype=dtype, device="meta")
    for training in (True, False):
        with torch.no_grad():
            yield type(module).forward(_on_meta(module).train(training), x)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of the module with empty tensors; of what else it holds, what may be written into."""
    twin = copy.copy(module)
    own = twin.__dict__
    own.update({k: copy.copy(v) for k, v in own.items() if isinstance(v, (list, dict, set))})
    own["_parameters"] = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), False)
        for name, p in module._parameters.items()
    }
    own["_buffers"] = {
        name: None if b is None else torch.empty_like(b, device="meta")
        for name, b in module._buffers.items()
    }
    own["_modules"] = {
        name: None if child is None else _on_meta(child) for name, child in module._modules.items()
    }
    return twin
