"""Weights W (out, in) of a Linear as bitsandbytes holds them.

4 bits (`Linear4bit`: NF4, FP4): blocks of 64 values along a row share a scale,
W[i] = scale[block of i] * code[q[i]], two indices q to a byte; with double quantisation the scales
are held in 8 bits themselves (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3).

8 bits (`Linear8bitLt`): W[i, j] = SCB[i] / 127 * CB[i, j], CB in int8, SCB the largest absolute
value of row i (Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 3).

Rounding is bitsandbytes' own; it is imported when it is needed. What the classes here hold is
never written into: a merge puts new tensors in its place, so keeping the old ones costs no copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.utilities.dtensor import full_tensor, is_sharded
from lora_lightning.utilities.is_a import is_a

_MODULES = "bitsandbytes.nn.modules"
_PACKS = "support_avx512bf16_for_cpu"  # of a Linear4bit, and what that was before its adapters
_PACKED_BEFORE = "_cpu_packing_before_adapters"


def is_linear4bit(module: nn.Module) -> bool:
    """Tell whether `module` is bitsandbytes' Linear4bit, found without importing bitsandbytes."""
    return is_a(module, "Linear4bit", module=_MODULES)


def is_linear8bit(module: nn.Module) -> bool:
    """Tell whether `module` is bitsandbytes' Linear8bitLt, found without importing bitsandbytes."""
    return is_a(module, "Linear8bitLt", module=_MODULES)


def is_quantized_embedding(module: nn.Module) -> bool:
    """Tell whether `module` is bitsandbytes' embedding, found without importing bitsandbytes."""
    return is_a(module, "Embedding4bit", "Embedding8bit", module=_MODULES)


def settle_rounding_table(quant_type: str) -> None:
    """Make bitsandbytes' table for rounding to 4 bits on the CPU in float32.

    It makes it once per process, in the default dtype of that moment, which under `bf16-true` is
    bfloat16: every model after that would be rounded to other indices than in another process, and
    a checkpoint's base would not be known again. So does its table for rounding scales, which must
    not be made of tensors without values. `quant_type` is `nf4` or `fp4`.
    """
    from bitsandbytes.functional import quantize_4bit

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        quantize_4bit(torch.ones(64), quant_type=quant_type, compress_statistics=True)
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class Packed4bit:
    """The weight of a Linear4bit: packed indices, and bitsandbytes' `QuantState` of scales."""

    data: Tensor
    state: Any

    @staticmethod
    def of(module: Any) -> Packed4bit | None:
        """The weight of `module`, or None where it is dense still (before the first `.to`)."""
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            state = module.quant_state  # where FSDP has put a parameter of its own in place
        if state is None:
            return None
        if not is_sharded(module.weight):
            unpack_from_cpu_layout(module)
        return Packed4bit(module.weight.data, state)

    def dense(self) -> Tensor:
        """W in float32, whatever dtype the layer computes in."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        kept = ("absmax", "shape", "code", "blocksize", "quant_type", "offset", "state2")
        wide = QuantState(**{k: getattr(self.state, k) for k in kept}, dtype=torch.float32)
        return dequantize_4bit(full_tensor(self.data), wide)

    def like(self, dense: Tensor) -> Packed4bit:
        """Another W, rounded in the same way."""
        from bitsandbytes.functional import quantize_4bit

        data, state = quantize_4bit(
            dense.float().contiguous(),
            blocksize=self.state.blocksize,
            compress_statistics=self.state.nested,
            quant_type=self.state.quant_type,
            quant_storage=self.data.dtype,
        )
        state.dtype = self.state.dtype
        return Packed4bit(data, state)

    def write(self, module: Any) -> None:
        """Make it the weight of `module`, whose parameter stays the same object."""
        self.state.to(module.weight.device)
        module.weight.data = self.data.to(module.weight.device)
        module.weight.quant_state = module.quant_state = self.state

    def tensors(self) -> dict[str, Tensor]:
        """All it consists of, as plain tensors by the names they have in a state dict."""
        state = self.state.as_dict(packed=True)
        return {"weight": self.data, **{f"weight.{name}": part for name, part in state.items()}}


@dataclass(frozen=True)
class Packed8bit:
    """The weight of a Linear8bitLt: CB and SCB; a floating-point weight has no SCB."""

    codes: Tensor
    scale: Tensor | None

    @staticmethod
    def of(module: Any) -> Packed8bit:
        """The weight of `module`; SCB lies on the parameter until the first forward takes it."""
        weight = module.weight
        if weight.is_floating_point():  # rounded anew in forward, or before the first `.to`
            return Packed8bit(weight.data, None)
        scale = getattr(weight, "SCB", None)
        return Packed8bit(weight.data, module.state.SCB if scale is None else scale)

    def dense(self) -> Tensor:
        """W in float32, as the layer's own forward and backward have it."""
        if self.scale is None:
            return self.codes.float()
        return self.codes.float() * (self.scale.float() * (1 / 127)).unsqueeze(1)

    def like(self, dense: Tensor) -> Packed8bit:
        """Another W, rounded in the same way, which is by way of float16.

        Raises:
            AdapterStateError: If a value is beyond float16.

        """
        if self.scale is None:
            return Packed8bit(dense.to(self.codes.dtype), None)
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scale, _ = int8_vectorwise_quant(dense.half())
        if not torch.isfinite(scale).all():
            raise AdapterStateError(
                "The merged weight of a Linear8bitLt has values beyond float16, by way of which "
                "bitsandbytes rounds to 8 bits; nothing was merged into it. The adapter has "
                "diverged."
            )
        return Packed8bit(codes, scale)

    def write(self, module: Any) -> None:
        """Make it the weight of `module`, whose parameter stays the same object."""
        weight = module.weight
        weight.data = self.codes.to(weight.device)
        module.state.reset_grads()  # what forward remembers of the weight
        if self.scale is not None:  # from here the next forward takes them
            weight.CB, weight.SCB = weight.data, self.scale.to(weight.device)

    def tensors(self) -> dict[str, Tensor]:
        """All it consists of, as plain tensors by the names they have in a state dict."""
        return {"weight": self.codes} | ({} if self.scale is None else {"SCB": self.scale})


def unpack_from_cpu_layout(module: Any) -> None:
    """Undo what a forward in eval mode does to a Linear4bit on a CPU with AVX512-BF16.

    There bitsandbytes packs the weight anew for a product that no gradient goes through, and the
    scales are rounded to bfloat16 for good. The values stay those that it acts with since; double
    quantisation is not repeated, which would round once more.
    """
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        state.original_nested = False
        state.state2 = None
        module.weight.data, _ = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    if state.absmax.dim() == 2:  # (blocks of a row, out): bitsandbytes' inverse forgets these
        state.absmax = state.absmax.t().reshape(-1).float()


def round_placeholder(module: Any, dense: Tensor) -> None:
    """Give a layer of bitsandbytes a packed weight in the place of one that was never rounded.

    `dense` has no values (`fake_tensors`), and so have the parts of what it is rounded to. They are
    of bitsandbytes' own operations, so their shapes and types are. Its parameter is a plain one:
    torch makes no other of a tensor without memory.
    """
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    old = module.weight
    if is_linear4bit(module):
        data, state = quantize_4bit(
            dense,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        new: Any = nn.Parameter(data, requires_grad=False)
        new.quant_state = module.quant_state = state
    else:
        codes, scale, _ = int8_vectorwise_quant(dense.half())
        new = nn.Parameter(codes, requires_grad=False)
        new.CB, new.SCB, new.has_fp16_weights = codes, scale, False
    module._parameters["weight"] = new


def close_cpu_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference while a model carries adapters.

    On a CPU with AVX512-BF16 the first forward of a `Linear4bit` in eval mode packs its weight
    anew, for a product through which no gradient goes: after one validation batch, training on
    would leave everything below that layer without gradients. It also rounds the scales of the base
    to bfloat16, and fails where the sizes are no multiples of 32 and 64. (bitsandbytes 0.50.2,
    `Linear4bit.forward` and `matmul_4bit`.) Layers without adapters stand in the way of gradients
    too, so all are seen to.
    """
    if not any(isinstance(module, AdaptedLayer) for module in model.modules()):
        return
    for module in filter(is_linear4bit, model.modules()):
        if _PACKED_BEFORE not in module.__dict__:
            module.__dict__[_PACKED_BEFORE] = getattr(module, _PACKS, False)
            setattr(module, _PACKS, False)
            Packed4bit.of(module)  # which unpacks it


def reopen_cpu_packing(model: nn.Module) -> None:
    """Undo `close_cpu_packing`; the layout changes at the next forward in eval mode."""
    for module in filter(is_linear4bit, model.modules()):
        if _PACKED_BEFORE in module.__dict__:
            setattr(module, _PACKS, module.__dict__.pop(_PACKED_BEFORE))
