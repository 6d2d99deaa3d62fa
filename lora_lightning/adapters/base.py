"""Base classes of all adapters: a named set of trainable tensors on one weight.

The map of a module with adapters is composed of them, in the order in which they were added:
f_0 is the module's own map, and adapter k turns f_(k-1) into

    f_k(x) = forward(x, f_(k-1)(transform_input(x))),

on weights W_k = transform_weight(W_(k-1)). An adapter says both, so that every layer can run it and
merge it; most are additive, W_k = W_(k-1) + delta.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, ValuesView
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.config import AdapterConfig, pattern_value
from lora_lightning.adapters.initialization import generator_for
from lora_lightning.errors import RankError
from lora_lightning.utilities.autocast import is_autocast
from lora_lightning.utilities.offload_hooks import KeepsTensors


@dataclass(frozen=True)
class Convolution:
    """Geometry of a convolution over `dims` (1, 2 or 3) dimensions."""

    dims: int
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str


class BaseWeight(Protocol):
    """The frozen weight that an adapter sits on, and the map of the module with it.

    Weights are in the canonical layout: linear (out, in); conv (out, in / groups, *kernel);
    embedding (num_embeddings, embedding_dim); experts as stored.
    """

    layer: nn.Module  # that the weight belongs to

    @property
    def bias(self) -> Tensor | None:
        """The bias that goes with the weight, (out,)."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the module's map to x with another weight of the same layout, without bias."""

    def base_weight(self) -> Tensor:
        """Return the weight as it was before any merge, dense."""

    def weight_below(self, adapter: Adapter) -> Tensor:
        """Return the weight of the map that `adapter` acts on, dense."""

    def bias_below(self, adapter: Adapter) -> Tensor | None:
        """Return the bias of the map that `adapter` acts on, (out,)."""


@dataclass(frozen=True)
class AdapterSpec:
    """All that one adapter on one weight is made from.

    Attributes:
        config: The options shared by all adapters of one injection.
        kind: "linear", "conv", "embedding" or "experts".
        shape: Of the weight, in the canonical layout: linear (out, in); conv (out, in / groups,
            *kernel); embedding (num_embeddings, embedding_dim); experts as stored.
        path: Of the module, without the adapter's name.
        name, seed: Random start values depend on them, beside the tensor's own name.
        device, base_dtype: Of the base weight; device "meta" for `low_cpu_mem_usage`.
        conv: The convolution's geometry where kind is "conv".
        check_rank: True if a rank that exceeds the weight's is an error.
        fit_rank: True if it is lowered to the weight's instead, unless rank_pattern names it.
        transposed: True if the experts' weight is stored as (experts, in, out).
        attention: Path of the attention that an `out_proj` is adapted together with: patterns that
            name the attention hold for both, unless others name the `out_proj` itself.
        shared: One object for all adapters of an injection; `config.prepare` made it.
        autocast_adapter_dtype: True if 16-bit bases get fp32 adapters (PEFT's name for it).

    """

    config: Any
    kind: str
    shape: tuple[int, ...]
    path: str
    name: str
    seed: int
    device: torch.device
    base_dtype: torch.dtype
    conv: Convolution | None = None
    check_rank: bool = True
    fit_rank: bool = False
    transposed: bool = False
    attention: str | None = None
    shared: Any = None
    autocast_adapter_dtype: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapter's tensors: float32, or the base's where that is wider or asked for."""
        narrow = self.base_dtype in (torch.bfloat16, torch.float16)
        follow = narrow and not self.autocast_adapter_dtype
        return self.base_dtype if follow or self.base_dtype == torch.float64 else torch.float32

    @property
    def groups(self) -> int:
        """Of the convolution; 1 of any other map."""
        return 1 if self.conv is None else self.conv.groups

    def rank(self, largest: int | None = None) -> int:
        """r of this module, `rank_pattern` applied; by `fit_rank` at most `largest`.

        Raises:
            RankError: If it exceeds `largest`.

        """
        named = self._by_pattern(self.config.rank_pattern, None)
        r = int(self.config.r if named is None else named)
        if self.fit_rank and named is None and largest is not None:
            return min(r, largest)
        if self.check_rank and largest is not None and r > largest:
            last = self.path.rpartition(".")[2]
            if last.isdigit():  # which YAML reads as a number, and which other modules end in, too
                last = repr(self.path)
            key = "rank_pattern" if r != self.config.r else "r"
            raise RankError(
                f"r={r} is larger than {self.path!r} (weight {tuple(self.shape)}) allows: at most "
                f"{largest}. Lower r, give this layer its own with rank_pattern: "
                f"{{{last}: {largest}}}, leave it out with exclude_modules: [{last}], or train it "
                f"in full with modules_to_save: [{last}]. (lora.{key})"
            )
        return r

    def alpha(self, default: float) -> float:
        """Alpha of this module, `alpha_pattern` applied."""
        return float(self._by_pattern(self.config.alpha_pattern, default))

    def _by_pattern(self, patterns: Any, default: Any) -> Any:
        if self.attention is not None:
            default = pattern_value(patterns, self.attention, default)
        return pattern_value(patterns, self.path, default)

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised trainable tensor of this adapter."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))

    def generator(self, tensor_name: str) -> torch.Generator:
        """Random numbers for the start of one tensor."""
        return generator_for(self.seed, f"{self.name}.{tensor_name}")


class AdapterModule(KeepsTensors):
    """The tensors that one adapter has on one module: the values of `AdapterDict`.

    Attributes:
        config: The options it was made from; shared by all adapters of one injection.
        autocast_adapter_dtype: True if its tensors stay fp32 when a model is cast to 16 bits.
        is_applied: True while it takes part in forward.
        applied: The same as a number, so that switching recompiles nothing and it can be averaged.

    """

    config: AdapterConfig
    autocast_adapter_dtype = True
    is_applied: bool
    applied: Tensor

    def __init__(self, config: AdapterConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        flag = torch.empty((), device=device, dtype=torch.float32)
        self.register_buffer("applied", flag, persistent=False)
        self.set_applied(False)

    @torch.no_grad()
    def set_applied(self, applied: bool) -> None:
        """Record whether the adapter takes part in forward at present."""
        self.is_applied = applied
        self.applied.fill_(applied)

    def set_autocast_dtype(self, wanted: bool) -> None:
        """Record whether the own tensors stay fp32 when a model is cast to 16 bits."""
        self.autocast_adapter_dtype = wanted

    def reset_parameters(self) -> None:
        """Set the own tensors to their start values; called again after meta materialisation."""
        self.set_applied(self.is_applied)

    def by_weight(self) -> dict[str, Adapter]:
        """Return the adapter on each weight of the module, by the weight's name."""
        return {}


class Adapter(AdapterModule):
    """Tensors and maths of one adapter on one weight.

    Args:
        spec: All that is known of the weight and asked of the adapter.

    Attributes:
        needs_weight: True if `start_from_weight` has something to do.
        additive: True if it adds to output and weight the same whatever else is applied.
        file_names: What PEFT's files call a tensor, where that differs from its name here:
            {"lora_A": "lora_A.weight"}.
        not_in_files: Names of tensors that PEFT's files do not hold.
        fitted_rank: The rank where it was lowered to what the weight allows; None: as asked.

    """

    needs_weight = False
    additive = False
    file_names: ClassVar[dict[str, str]] = {}
    not_in_files: ClassVar[frozenset[str]] = frozenset()
    fitted_rank: int | None = None

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__(spec.config, spec.device)
        self.spec = spec

    def by_weight(self) -> dict[str, Adapter]:
        """Return itself, on the module's only weight."""
        return {"weight": self}

    def start_from_weight(self, weight: Tensor) -> None:
        """Set the start values that are computed from the dense base weight."""

    def peft_supports(self, conv: Convolution, kernel: tuple[int, ...]) -> bool:
        """Tell whether PEFT computes the same from this type on such a convolution."""
        return conv.padding_mode == "zeros"  # others it leaves out

    def why_no_weight(self, has_bias: bool) -> str | None:
        """Why what it does is no other weight and bias; None where it is, so that it can merge."""
        return None

    def file_state(self) -> dict[str, Tensor]:
        """Return the tensors under the names, and in the form, that PEFT's files give them."""
        return {self.file_names.get(k, k): tensor for k, tensor in self.state_dict().items()}

    def transform_input(self, x: Tensor, base: BaseWeight) -> Tensor:
        """Return what the map below this adapter reads instead of `x`, of the same shape."""
        return x

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """Return the output after this adapter, in y's shape and dtype.

        Args:
            x: What this adapter was given: linear (..., in), conv (batch, in, *size), embedding
                ids (...).
            y: What the map below it made of `transform_input(x)`: (..., out), (batch, out,
                *size'), (..., embedding_dim).
            base: The weight that it sits on.

        """
        return y

    def transform_weight(self, weight: Tensor, base: BaseWeight) -> Tensor:
        """Return the weight of the map after this adapter, from that of the map below it."""
        return weight

    def transform_bias(self, bias: Tensor, base: BaseWeight) -> Tensor:
        """Return the bias of the map after this adapter, from that of the map below it."""
        return bias

    def if_applied(self, after: Tensor, before: Tensor) -> Tensor:
        """Return `after`; inside compiled code, which holds all adapters, `before` if not applied.

        Outside of compiled code nothing is asked of adapters that are not applied.
        """
        if after is before or not torch.compiler.is_compiling():
            return after
        return torch.where(self.applied != 0, after, before)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # "bf16-true" narrows the base, not the adapter: small updates would be rounded away.
        def keep_master_copy(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # Single numbers are settings (`scaling_tensor`), no less exact in a narrow adapter.
            kept = self.autocast_adapter_dtype or not tensor.dim()
            if kept and moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(keep_master_copy, recurse)  # type: ignore[no-untyped-call]


class DeltaAdapter(Adapter):
    """An adapter that adds to the weight: W + delta_weight().

    Attributes:
        scaling: The factor in front of the update.
        scaling_tensor: The same as a tensor, so that compiled code is not tied to one value.

    """

    scaling: float
    scaling_tensor: Tensor
    additive = True

    def __init__(self, spec: AdapterSpec, scaling: float) -> None:
        super().__init__(spec)
        wide = torch.promote_types(spec.dtype, torch.float32)
        number = torch.empty((), device=spec.device, dtype=wide)
        self.register_buffer("scaling_tensor", number, persistent=False)
        self.config_scaling = scaling  # of the config; `scaling` is what acts
        self.set_scaling(scaling)

    def reset_parameters(self) -> None:
        """Set the own tensors to their start values; called again after meta materialisation."""
        super().reset_parameters()
        self.set_scaling(self.scaling)

    @torch.no_grad()
    def set_scaling(self, scaling: float) -> None:
        """Give the update another factor."""
        self.scaling = scaling
        self.scaling_tensor.fill_(scaling)

    def scale(self) -> float | Tensor:
        """`scaling`; inside compiled code as a tensor, so that rescaling does not recompile."""
        return self.scaling_tensor if torch.compiler.is_compiling() else self.scaling

    def delta_weight(self) -> Tensor:
        """The update of the weight, in the canonical layout and the adapter's own dtype."""
        raise NotImplementedError

    def update(self, x: Tensor, base: BaseWeight) -> Tensor:
        """Return the adapter's share of the output: delta_weight() applied to x."""
        weight = self.delta_weight()
        if not is_autocast(x) and x.is_floating_point():
            weight = weight.to(x.dtype)
        return base.apply_weight(x, weight)

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + update(x), in y's dtype."""
        return y + self.update(x, base).to(y.dtype)

    def transform_weight(self, weight: Tensor, base: BaseWeight) -> Tensor:
        """Weight + delta_weight()."""
        return weight + self.delta_weight().to(weight)


class MultiWeightAdapter(AdapterModule):
    """An adapter on a module of several weights: a child for each, under the weight's name."""

    def __init__(self, config: AdapterConfig, adapters: dict[str, Adapter]) -> None:
        super().__init__(config)
        for weight_name, adapter in adapters.items():
            self.add_module(weight_name, adapter)

    def by_weight(self) -> dict[str, Adapter]:
        """Return the children."""
        return cast("dict[str, Adapter]", self._modules)

    def set_applied(self, applied: bool) -> None:
        """Record it in the children, too."""
        super().set_applied(applied)
        for adapter in self.by_weight().values():
            adapter.set_applied(applied)

    def set_autocast_dtype(self, wanted: bool) -> None:
        """Record it in the children, too."""
        super().set_autocast_dtype(wanted)
        for adapter in self.by_weight().values():
            adapter.set_autocast_dtype(wanted)

    def reset_parameters(self) -> None:
        """Set the tensors of the children to their start values."""
        super().reset_parameters()
        for adapter in self.by_weight().values():
            adapter.reset_parameters()


class AdapterDict(nn.ModuleDict):
    """The adapters of one module by name. Its type is how adapters are told from base modules."""

    def __getitem__(self, name: str) -> AdapterModule:
        return cast(AdapterModule, super().__getitem__(name))

    def forward(self, *args: Any) -> Any:
        """Nothing enters here; FSDP wants a forward of what it shards."""
        raise NotImplementedError("Adapters run in the forward around (children() has them, too).")

    def values(self) -> ValuesView[AdapterModule]:
        """Return the adapters in the order in which they were added."""
        return cast("ValuesView[AdapterModule]", self._modules.values())

    def items(self) -> ItemsView[str, AdapterModule]:
        """Return names and adapters in the order in which they were added."""
        return cast("ItemsView[str, AdapterModule]", self._modules.items())

    def get(self, name: str) -> AdapterModule | None:
        """The adapter of that name, or None."""
        return self[name] if name in self else None  # noqa: SIM401
