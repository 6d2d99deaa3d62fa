"""`nn.MultiheadAttention` as a layer: adapters on its input projections, and on `out_proj`.

    q, k, v = x_q W_q^T + b_q, x_k W_k^T + b_k, x_v W_v^T + b_v;
    head_i = softmax(q_i k_i^T / sqrt(d) + mask) v_i;    y = concat(head_1, ..., head_h) W_o^T + b_o

(Vaswani et al. 2017, arXiv:1706.03762, section 3.2.) Torch hands the weights of all this to one
function and calls no module, so an adapter could only act by being written into them. Here q, k
and v are projected through the adapters and `out_proj` is called as the module that it is; between
the two stand the operations of `F.multi_head_attention_forward`, in its order. The base weights
are only read. Where no adapter acts, torch's own forward runs, with its fast path.

The input weights are `in_proj_weight` (3 e, e), rows in the order q, k, v; or, with kdim or vdim,
`q_proj_weight` (e, e), `k_proj_weight` (e, kdim) and `v_proj_weight` (e, vdim). Adapters see each
as a Linear. One on `out_proj` sits on that Linear itself; then the attention is an adapted layer
even without adapters of its own (`route_out_projections`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterModule, BaseWeight
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers import parametrized
from lora_lightning.layers.attention_heads import Masks, attend
from lora_lightning.layers.autocast_cache import autocast_input
from lora_lightning.layers.base import AdaptedLayer, WeightView, compose
from lora_lightning.layers.conversion import convert_back, convert_to_adapted
from lora_lightning.layers.dynamic_class import adapted_class
from lora_lightning.layers.instance_forward import instance_patch
from lora_lightning.layers.traversal import walk

PACKED = "in_proj_weight"
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class AdaptedMultiheadAttention(AdaptedLayer):
    """Multi-head attention; shapes as in `nn.MultiheadAttention`."""

    kind = "linear"

    embed_dim: int
    batch_first: bool
    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear

    # -- weights and biases ----------------------------------------------------------------------

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"in_proj_weight": (3 e, e)}, or the three separate weights."""
        names = (PACKED,) if self.is_packed() else SEPARATE
        return {name: tuple(self.dense_weight(name).shape) for name in names}

    def is_packed(self) -> bool:
        """True if q, k and v have one weight, parametrized or not."""
        return PACKED not in self._parameters or self._parameters[PACKED] is not None

    def bias_name(self, name: str = "weight") -> str:
        """All of `in_proj_bias`, or the third of it that goes with a separate weight."""
        return name.replace("weight", "bias")

    # Views of in_proj_bias, by the names of the separate weights.
    q_proj_bias = property(lambda self: self._third(0))
    k_proj_bias = property(lambda self: self._third(1))
    v_proj_bias = property(lambda self: self._third(2))

    def _third(self, index: int) -> Tensor | None:
        bias = cast("Tensor | None", parametrized.value(self, "in_proj_bias"))
        return None if bias is None else bias.chunk(3)[index]

    def kept_tensors(self) -> dict[str, Tensor]:
        """The originals, thirds of the bias put together."""
        kept = super().kept_tensors()
        names = [self.bias_name(name) for name in SEPARATE]
        if any(name in kept for name in names):
            kept["in_proj_bias"] = torch.cat([self.base_weight(name) for name in names]).detach()
        return {name: tensor for name, tensor in kept.items() if name not in names}

    def file_places(self, names: list[str]) -> dict[str, str]:
        """PEFT holds what is on the packed weight in the wrapper of the module itself."""
        return {name: "" if name == PACKED else f"{name}." for name in names}

    def peft_supports(self, adapter: AdapterModule) -> bool:
        """Plain LoRA on the packed weight is all that PEFT can do here."""
        options = ("use_dora", "lora_bias", "lora_dropout")
        plain = not any(getattr(adapter.config, option, None) for option in options)
        return plain and adapter.config.peft_type == "LORA" and self.is_packed()

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product x weight^T."""
        return F.linear(x, weight)

    # -- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, with the adapters that are applied."""
        self.check_recomputation(self.base_type.__name__)
        self.note_reached()
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        output: tuple[Tensor, Tensor | None]
        if parametrized.reads_anew(self):
            with parametrized.reads_once():
                output = self.forward_with_adapters(query, key, value, *options)
            return output
        if not self._has_applied_adapters():
            with self.computing():
                output = self.base_forward(query, key, value, *options)
            return output
        self.note_use()
        self._check_inputs(query, key, value)
        masks = Masks(key_padding_mask, attn_mask, is_causal)
        with self.computing():
            y, weights = self._attend((query, key, value), masks, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if query.dim() == 2:
            return y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y.transpose(0, 1) if self.batch_first else y, weights

    def _attend(
        self, inputs: tuple[Tensor, Tensor, Tensor], masks: Masks, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output (L, N, e) and, if wanted, the weights of every head."""
        module = cast(nn.MultiheadAttention, self)
        q, k, v = self._project_in(inputs)
        if inputs[0].dim() == 2:
            q, k, v = (x.unsqueeze(1) for x in (q, k, v))
            if masks.key_padding is not None:
                masks = masks._replace(key_padding=masks.key_padding.unsqueeze(0))
        elif self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        y, weights = attend(module, q, k, v, masks, need_weights, self.training)
        return self._project_out(y), weights

    def _has_applied_adapters(self) -> bool:
        if self._rows is not None:
            return True
        if isinstance(self.out_proj, AdaptedLayer) and self.out_proj.applied_adapters():
            return True
        return any(self.applied_adapters(name) for name in self.weight_shapes())

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            found = [tuple(x.shape) for x in (query, key, value)]
            raise ValueError(
                f"query, key and value must all be 2-D (unbatched) or all 3-D, but are {found}."
            )
        if any(x.is_nested for x in (query, key, value)):
            raise AdapterStateError(
                "nn.MultiheadAttention takes nested tensors in its fast path only, which reads the "
                "weights past their adapters. Pass padded tensors and a key_padding_mask."
            )

    def _project_in(self, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        # As torch does it, down to the rounding: keys with values where they are made from the same
        # tensor, and all at once where the queries are too.
        query, key, value = inputs
        starts = [0, 1, 2]
        if self.is_packed() and key is value:
            starts = [0] if query is key else [0, 1]
        outputs: list[Tensor] = []
        for start, stop in zip(starts, [*starts[1:], 3], strict=True):
            y = self._project(inputs[start], start, stop)
            outputs += y.split(self.embed_dim, dim=-1)
        return outputs

    def _project(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Thirds `start` to `stop` of (q, k, v), all made from x."""
        packed = self.is_packed()
        name = PACKED if packed else SEPARATE[start]
        weight = cast(Tensor, getattr(self, name))
        bias: Tensor | None = self.in_proj_bias
        size, offset = weight.shape[0], 0 if packed else start * self.embed_dim
        first, last = start * self.embed_dim - offset, stop * self.embed_dim - offset
        chains = self._chains(name)
        adapters = [adapter for chain in chains.values() for adapter in chain]
        # Adapters are given all rows of the weight's output. Those that add to it do not look at
        # it, so that rows nobody wants need not be computed for them.
        low, high = (first, last) if all(a.additive for a in adapters) else (0, size)
        absent = (low, size - high) if adapters else (0, 0)
        weight = weight[low:high]
        bias = None if bias is None else bias[offset + low : offset + high]

        def base_map(z: Tensor) -> Tensor:
            if z.dim() == 3 and self.batch_first:  # the layout, and so the rounding, of torch
                y = F.linear(z.transpose(0, 1), weight, bias).transpose(0, 1)
            else:
                y = F.linear(z, weight, bias)
            return F.pad(y, absent) if any(absent) else y

        y = self._fold(chains, autocast_input(x), base_map, WeightView(self, name))
        return y if y.shape[-1] == last - first else y[..., first:last]

    def _fold(
        self,
        chains: dict[str | None, list[Adapter]],
        x: Tensor,
        base_map: Callable[[Tensor], Tensor],
        base: BaseWeight,
    ) -> Tensor:
        names, dim = self._rows, 0 if self.batch_first else 1
        if names is None:
            return cast(Tensor, compose(chains[None], x, base_map, base))
        if x.dim() != 3 or x.shape[dim] != len(names):
            raise AdapterStateError(
                f"adapters_per_row names an adapter for each of {len(names)} rows, but a "
                f"{self.base_type.__name__} (batch_first={self.batch_first}) was called with "
                f"{tuple(x.shape)}."
            )
        parts, order = [], []
        for name, chain in chains.items():
            rows = [i for i, other in enumerate(names) if other == name]
            rows_of_x = x.index_select(dim, torch.tensor(rows, device=x.device))
            parts.append(compose(chain, rows_of_x, base_map, base))
            order += rows
        return torch.cat(parts, dim).index_select(dim, torch.tensor(order).argsort().to(x.device))

    def _chains(self, weight_name: str) -> dict[str | None, list[Adapter]]:
        """The adapters on one weight, for each name in `row_adapters`; None: for all, or none."""
        if self._rows is None:
            return {None: self.applied_adapters(weight_name)}
        chains: dict[str | None, list[Adapter]] = {name: [] for name in self._rows}
        for name, chain in chains.items():
            if name is None or name not in self.adapters or not self._enabled:
                continue
            if name in self.trained_copies():
                raise AdapterStateError(
                    f"Adapter {name!r} replaces a whole {self.base_type.__name__} by a copy "
                    "(modules_to_save), which adapters_per_row cannot do for single rows."
                )
            on_weight = self.adapters[name].by_weight()
            chain += [on_weight[weight_name]] if weight_name in on_weight else []
        return chains

    def _project_out(self, y: Tensor) -> Tensor:
        if self._rows is not None:  # which want the batch first
            return cast(Tensor, self.out_proj(y.transpose(0, 1))).transpose(0, 1)
        return cast(Tensor, self.out_proj(y))


def attention_obstacle(module: nn.MultiheadAttention) -> str | None:
    """Why the projections of `module` cannot carry adapters, or None where they can."""
    layer = module if isinstance(module, AdaptedLayer) else None
    kind = type(module) if layer is None else layer.base_type
    if kind.forward is not nn.MultiheadAttention.forward:
        return (
            f"{kind.__name__} has a forward of its own, of which it is not known whether it reads "
            "the projections' weights past their adapters"
        )
    patch = instance_patch(module) if layer is None else layer._instance_forward
    if patch is not None:
        return "its forward was replaced on the instance, and adapters would pass that by"
    if layer is not None and layer.layer_type not in (AdaptedLayer, AdaptedMultiheadAttention):
        return "single parameters of the attention carry adapters already (target_parameters)"
    if layer is None and hasattr(module, "adapters"):
        return "it already has an attribute `adapters` of its own, where adapters would live"
    return None


def route_out_projections(model: nn.Module) -> None:
    """Convert each attention whose `out_proj` is adapted; convert back those that need it no more.

    An empty layer has nothing to merge or to save: it only calls `out_proj` instead of reading its
    weight.
    """
    for _, module in list(walk(model)):
        if not isinstance(module, nn.MultiheadAttention) or attention_obstacle(module) is not None:
            continue
        if isinstance(module.out_proj, AdaptedLayer):
            convert_to_adapted(module, AdaptedMultiheadAttention)
        elif (
            isinstance(module, AdaptedMultiheadAttention)
            and not module.adapters
            and type(module) is adapted_class(module.layer_type, module.base_type)  # not wrapped
        ):
            convert_back(module)
