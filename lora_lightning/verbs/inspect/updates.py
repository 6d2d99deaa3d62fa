"""Size and effective rank of what adapters add to weights, from their small factors alone.

The effective rank is `entropy_rank`: how many directions there are if all weighed the same.
Singular values of a Kronecker product are the products of those of its two factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.config import pattern_value
from lora_lightning.adapters.plain_lora import Factors, hadamard_factors
from lora_lightning.checkpoint.peft.config import is_costly
from lora_lightning.engine.update_spectrum import entropy_rank, low_rank_singular_values

_LARGEST_RANK = 4096  # of a product that is measured

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight.

    Attributes:
        module: Its path.
        rank: What the factors allow; None where the update has none.
        norm: ||W' - W||_F; None where that depends on W.
        effective_rank: exp of the entropy of its normalised singular values; None likewise.
        note: What the figures leave out, or why there are none.

    """

    module: str
    rank: int | None = None
    norm: float | None = None
    effective_rank: float | None = None
    note: str = ""
    factors: Factors | None = field(default=None, repr=False, compare=False)


def measured(module: str, kind: str, tensors: Tensors, options: Mapping[str, Any]) -> Update:
    """The figures of one module's adapter, of the type `kind`."""
    try:
        with torch.no_grad():
            return _measured(module, kind, tensors, options)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:  # of any file
        reason = str(error).split("\n")[0]
        return Update(module, note=f"not measured: {reason}")


def norm_of(factors: Factors) -> float:
    """||B A||_F."""
    return float(torch.linalg.vector_norm(low_rank_singular_values(*factors)))


def _measured(module: str, kind: str, tensors: Tensors, options: Mapping[str, Any]) -> Update:
    if any(name == "module" or name.startswith("module.") for name in tensors):
        return Update(module, note="trains in full")
    if any("trainable_tokens_delta" in name for name in tensors):
        rows = next(iter(tensors.values()))
        return Update(module, note=f"{len(rows)} rows train in full")
    found = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    if bad := [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]:
        return Update(module, note=f"not finite: {', '.join(bad)}")
    if kind == "LOKR":
        return _kronecker(module, found, options)
    if kind == "SHIRA":
        values = found["shira_weight"]
        norm = float(torch.linalg.vector_norm(values.double()))
        return Update(module, norm=norm, note=f"{values.numel():,} single entries")
    factors, note = _factors(module, kind, found, options)
    if factors is None:
        return Update(module, note=note)
    values = low_rank_singular_values(*factors)
    norm = float(torch.linalg.vector_norm(values))
    return Update(module, len(factors[0]), norm, entropy_rank(values), note, factors)


def _factors(
    module: str, kind: str, found: Tensors, options: Mapping[str, Any]
) -> tuple[Factors | None, str]:
    """(A, B) with the scale in B, and what they leave out."""
    if kind == "LOHA" and "hada_t1" not in found:
        a1, b1 = found["hada_w1_a"].double(), found["hada_w1_b"].double()
        a2, b2 = found["hada_w2_a"].double(), found["hada_w2_b"].double()
        if len(b1) * len(b2) > _LARGEST_RANK:
            return None, f"not measured: of rank {len(b1) * len(b2)}"
        scale = _scale(module, len(b1), options, "alpha")
        return hadamard_factors(a1 * scale, b1, a2, b2), ""
    names = ("lora_A", "lora_B") if "lora_A" in found else ("lora_embedding_A", "lora_embedding_B")
    if kind not in ("LORA", "ADALORA") or names[0] not in found:
        return None, f"an update of the type {kind} depends on the weight"
    a, b = (found[name].double().flatten(1) for name in names)
    if kind == "ADALORA":
        r = int(options.get("init_r", len(a)))
        scale = float(options.get("lora_alpha", 8)) / (r + 1e-5)
        return (a, b * (scale * found["lora_E"].double().flatten())), ""
    scale = _scale(module, len(a), options, "lora_alpha")
    if options.get("target_parameters") and a.shape[0] != _rank(module, options, len(a)):
        return None, "not measured: on a parameter"
    if "lora_A_start" in found:
        a = torch.cat([a, found["lora_A_start"].double()])
        b = torch.cat([b, -found["lora_B_start"].double()], dim=1)
    dora = any("lora_magnitude_vector" in name for name in found)
    return (a, scale * b), "of B A alone, before DoRA rescales it" if dora else ""


def _kronecker(module: str, found: Tensors, options: Mapping[str, Any]) -> Update:
    if "lokr_t2" in found:
        return Update(module, note="not measured: a core and two matrices")
    r = len(found["lokr_w2_b"]) if "lokr_w2_b" in found else _rank(module, options, 1)
    parts = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in found:
            parts.append(torch.linalg.svdvals(found[name].double().flatten(1)))
        else:
            parts.append(
                low_rank_singular_values(found[f"{name}_b"].flatten(1), found[f"{name}_a"])
            )
    values = _scale(module, r, options, "alpha") * torch.kron(*parts)
    norm = float(torch.linalg.vector_norm(values))
    return Update(module, len(values), norm, entropy_rank(values))


def _rank(module: str, options: Mapping[str, Any], default: int) -> int:
    return int(_of_pattern(module, options, "rank_pattern", options.get("r", default)))


def _scale(module: str, r: int, options: Mapping[str, Any], alpha: str) -> float:
    value = float(_of_pattern(module, options, "alpha_pattern", options.get(alpha, 8)))
    return value / (math.sqrt(r) if options.get("use_rslora") else r)


def _of_pattern(module: str, options: Mapping[str, Any], option: str, default: Any) -> Any:
    pattern = options.get(option) or {}
    if any(is_costly(str(expression)) for expression in pattern):
        raise ValueError(f"an expression in {option} could take for ever to match")
    return pattern_value(dict(pattern), module, default)
