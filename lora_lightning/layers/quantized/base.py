"""A Linear whose weight is held in few bits (bitsandbytes, torchao) as a layer.

y = Q x + b + what the adapters add. The base's forward is its own; adapters are fp32 tensors beside
it that nobody quantises. Merging dequantises, adds in float32 and rounds again in the same way,

    Q' = quantise(dequantise(Q) + delta),

which is as exact as the few bits allow (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314); what was
there is kept as it is, so that unmerging restores every bit.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_lightning.layers.base import AdaptedLayer, first_argument
from lora_lightning.layers.linear import AdaptedLinear
from lora_lightning.layers.quantized import bitsandbytes, torchao


class Packed(Protocol):
    """The weight of a quantised Linear; it never changes."""

    def dense(self) -> Tensor:
        """The weight (out, in) in float32."""

    def like(self, dense: Tensor) -> Packed:
        """Another weight, rounded in the same way."""

    def write(self, module: Any) -> None:
        """Make it the weight of `module`."""

    def tensors(self) -> dict[str, Tensor]:
        """All it consists of, as plain tensors by name, the weight or its parts first."""


def packed_weight(module: nn.Module) -> Packed | None:
    """The weight of a quantised module, or None where it is dense."""
    if bitsandbytes.is_linear4bit(module):
        return bitsandbytes.Packed4bit.of(module)
    if bitsandbytes.is_linear8bit(module):
        return bitsandbytes.Packed8bit.of(module)
    return torchao.PackedInt8.of(module) if torchao.has_torchao_weight(module) else None


def why_not_adaptable(module: nn.Module) -> str | None:
    """Why the quantised weight of a module cannot carry adapters; None where nothing is amiss."""
    if torchao.is_torchao_linear(module):
        return torchao.why_not_int8(module)
    if bitsandbytes.is_quantized_embedding(module) or torchao.has_torchao_weight(module):
        return (
            "has a quantised weight, which can carry adapters in a Linear only. Leave this module "
            "unquantised"
        )
    if bitsandbytes.is_linear4bit(module) or bitsandbytes.is_linear8bit(module):
        return None
    tensors = {**module._buffers, **module._parameters}
    for name in ("weight", "in_proj_weight"):
        tensor = tensors.get(name)
        if tensor is not None and _is_code(tensor):
            return _CODES.format(tensor.dtype)
    return None


_CODES = (
    "holds weights as {}, numbers that stand for others by scales of its own; nothing can be "
    "computed from them here. Load the model in 16 bits (transformers: quantization_config="
    "FineGrainedFP8Config(dequantize=True)), or quantise it with bitsandbytes or torchao"
)


def _is_code(tensor: Tensor) -> bool:
    """True for float8, float4 and integers: numbers that are no weights by themselves."""
    dtype = tensor.dtype
    return not dtype.is_complex and (not dtype.is_floating_point or dtype.itemsize < 2)


def why_not_trainable(module: nn.Module) -> str | None:
    """Why a copy of a module cannot train in full; None where nothing is amiss."""
    if any(packed_weight(part) is not None for part in module.modules()):
        return (
            "has a quantised weight, which cannot train in full. Give it an adapter, or leave it "
            "unquantised (BitsAndBytesConfig: llm_int8_skip_modules; BitsandbytesPrecision: "
            "ignore_modules; TorchAoConfig: modules_to_not_convert)"
        )
    for parameter in module.parameters():
        if parameter.is_floating_point() and _is_code(parameter):
            return _CODES.format(parameter.dtype)
    return None


class AdaptedQuantizedLinear(AdaptedLinear):
    """y = Q x + b; Q stands for a dense weight (out_features, in_features)."""

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"weight": (out_features, in_features)}, however it is packed."""
        return {"weight": (self.out_features, self.in_features)}  # type: ignore[dict-item]

    def weight_dtype(self, name: str = "weight") -> torch.dtype:
        """Float32, in which a weight is read and merged."""
        return torch.float32

    def dense_weight(self, name: str = "weight") -> Tensor:
        """The weight as it is now, dequantised to float32."""
        packed = packed_weight(self) if name == "weight" else None
        return AdaptedLayer.dense_weight(self, name) if packed is None else packed.dense()

    def base_weight(self, name: str = "weight") -> Tensor:
        """The weight as it was before any merge, dequantised to float32."""
        kept = self._kept.get(name)
        return (
            super().base_weight(name) if kept is None or isinstance(kept, Tensor) else kept.dense()
        )

    def is_plain(self) -> bool:
        """False: it is for the base to say what it reads under autocast."""
        return False

    def is_merged_exactly(self) -> bool:
        """True: what is merged is rounded, so that the output cannot be the same."""
        return True

    def keep(self, name: str) -> Any:
        """The packed weight as it is."""
        packed = packed_weight(self) if name == "weight" else None
        return super().keep(name) if packed is None else packed

    def restore(self, kept: Any, name: str) -> None:
        """Put back what `keep` gave."""
        if isinstance(kept, Tensor):
            super().restore(kept, name)
        else:
            kept.write(self)

    def store_weight(self, dense: Tensor, name: str) -> None:
        """Round a dense weight as the present one is rounded, and put it in its place."""
        packed = packed_weight(self) if name == "weight" else None
        if packed is None:
            super().store_weight(dense, name)
        else:
            packed.like(dense).write(self)

    def kept_tensors(self) -> dict[str, Tensor]:
        """The originals, as plain tensors by name."""
        tensors: dict[str, Tensor] = {}
        for name, kept in self._kept.items():
            tensors |= {name: kept} if isinstance(kept, Tensor) else kept.tensors()
        return tensors


class AdaptedBitsandbytesLinear(AdaptedQuantizedLinear):
    """A Linear of bitsandbytes, whose bias keeps its dtype.

    Its own forward would cast the bias, for good, to the dtype it computes in, and so round the
    base or a bias that trains.
    """

    def gives_output_away(self) -> bool:
        """True: bitsandbytes' backward reads only the weight."""
        forward = self.base_type.forward
        return forward.__module__ == "bitsandbytes.nn.modules" and self._instance_forward is None

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        bias = self._parameters.get("bias")
        if bias is None:
            return super().base_forward(*args, **kwargs)
        dtype = self._compute_dtype(first_argument(self, args, kwargs)[0])
        if bias.dtype == dtype:
            return super().base_forward(*args, **kwargs)
        try:
            self._parameters["bias"] = bias.to(dtype)  # type: ignore[assignment]
            return super().base_forward(*args, **kwargs)
        finally:
            self._parameters["bias"] = bias

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        chosen: torch.dtype | None = getattr(self, "compute_dtype", None)  # of a Linear4bit
        first = not getattr(self, "compute_type_is_set", True)
        if chosen is None or (first and x.dtype in (torch.float32, torch.bfloat16)):
            return x.dtype  # which the first input decides
        return chosen
