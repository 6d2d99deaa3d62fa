"""VeRA: LoRA whose two matrices are random, frozen and shared; a layer trains two vectors.

    W' = W + diag(lambda_b) B diag(lambda_d) A,    A (r, in), B (out, r)

A and B are cut out of one pair of matrices, as large as the largest layer needs, that all layers
of an adapter share.

Source: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation" (arXiv:2310.11454),
section 3. Names, shapes, start values and random numbers are those of PEFT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterSpec, BaseWeight, DeltaAdapter
from lora_lightning.adapters.config import AdapterConfig, Positive, Probability, Rank
from lora_lightning.adapters.initialization import constant_, normal_
from lora_lightning.errors import AdapterStateError, ConfigError
from lora_lightning.utilities.autocast import is_autocast
from lora_lightning.utilities.offload_hooks import KeepsTensors


@dataclass(frozen=True, kw_only=True)
class VeraConfig(AdapterConfig):
    """Options of a VeRA adapter; names and defaults are those of PEFT.

    Args:
        r: Rank of the update: much larger than LoRA's, since it costs next to nothing.
        projection_prng_key: Seed of the shared random matrices.
        save_projection: Save the shared matrices with the adapter. Without them files are small,
            but other versions of torch may draw other numbers.
        vera_dropout: Probability in [0, 1) of dropping an element of the adapter's input.
        d_initial: Start value of lambda_d.
        init_weights: true: lambda_b = 0 (the adapter starts as a no-op); false: random lambda_d and
            lambda_b = 1, for tests.

    """

    peft_type = "VERA"
    free_to_change = AdapterConfig.free_to_change | {"vera_dropout", "d_initial", "init_weights"}
    shared_file_keys = frozenset({"base_model.vera_A", "base_model.vera_B"})
    file_bias = "vera_only"

    r: Rank = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: Probability = 0.0
    d_initial: Positive = 0.1
    init_weights: bool = True

    def __post_init__(self) -> None:
        if type(self.projection_prng_key) is not int:
            raise ConfigError(
                f"projection_prng_key is {self.projection_prng_key!r}; it is an integer, the seed "
                "of the shared matrices. (lora.projection_prng_key)"
            )
        super().__post_init__()

    def prepare(
        self, shapes: Mapping[str, Sequence[tuple[int, ...]]], known: Mapping[str, Any]
    ) -> Projections:
        """The matrices for layers of these shapes: those that are there, or new ones."""
        outs, ins = zip(*(shape for weights in shapes.values() for shape in weights), strict=True)
        adapters = (module for adapter in known.values() for module in adapter.modules())
        for adapter in adapters:
            if isinstance(adapter, VeraAdapter):
                return adapter.shared[0].check_size(max(outs), max(ins))
        return Projections(self, max(outs), max(ins))


class Projections(KeepsTensors):
    """The shared matrices vera_A (r, largest in) and vera_B (largest out, r)."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, config: VeraConfig, out_features: int, in_features: int) -> None:
        super().__init__()
        self.key = config.projection_prng_key
        self.owned = False
        self.base_dtype = torch.float32
        shapes = {"vera_A": (config.r, in_features), "vera_B": (out_features, config.r)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape, device="meta"), config.save_projection)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """U(-b, b), b = sqrt(6 / columns), drawn on the CPU and rounded to the base's dtype."""
        if self.vera_A.is_meta:
            return
        generator = torch.Generator().manual_seed(self.key)
        for matrix in (self.vera_A, self.vera_B):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(matrix.shape[1]))  # PEFT's rounding
            draft = torch.empty(matrix.shape, dtype=torch.float32, device="cpu")
            draft.uniform_(-bound, bound, generator=generator)
            matrix.copy_(draft.to(self.base_dtype))

    def check_size(self, out_features: int, in_features: int) -> Projections:
        """These matrices, if they are large enough for a layer."""
        largest = (self.vera_B.shape[0], self.vera_A.shape[1])
        if out_features > largest[0] or in_features > largest[1]:
            raise AdapterStateError(
                f"A layer of {in_features} inputs and {out_features} outputs joins a VeRA adapter "
                f"whose shared matrices are made for at most {largest[1]} and {largest[0]}. Build "
                "the whole model before its adapters, or give the new layers an adapter of "
                "another name."
            )
        return self


class VeraAdapter(DeltaAdapter):
    """VeRA on a linear map: y + lambda_b * (B (lambda_d * (A dropout(x)))).

    The shared matrices are a child of the first adapter that was made with them: there they are
    moved, saved and filled once. The others look at them.

    Shapes:
        x (..., in), y (..., out); vera_lambda_d (r), vera_lambda_b (out).

    """

    config: VeraConfig

    file_names: ClassVar[dict[str, str]] = {
        "projections.vera_A": "base_model.vera_A",
        "projections.vera_B": "base_model.vera_B",
    }
    projections: Projections | None

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__(spec, 1.0)
        config: VeraConfig = spec.config
        self.spec = dataclasses.replace(spec, shared=None)
        shared: Projections = spec.shared
        self.shared = [shared]  # in a list: no child
        self.projections = None if shared.owned else shared
        if not shared.owned:
            shared.owned, shared.base_dtype = True, spec.base_dtype
            shared.to_empty(device=spec.device).to(spec.dtype)
        dropout = config.vera_dropout
        self.vera_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.vera_lambda_d = spec.parameter(config.r)
        self.vera_lambda_b = spec.parameter(spec.shape[0])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """lambda_b = 0 and lambda_d = d_initial, or as `init_weights: false` says."""
        super().reset_parameters()
        config = self.config
        constant_(self.vera_lambda_d, config.d_initial)
        constant_(self.vera_lambda_b, 0 if config.init_weights else 1)
        if not config.init_weights:
            normal_(self.vera_lambda_d, 1, self.spec.generator("vera_lambda_d"))
        if self.projections is not None:
            self.projections.reset_parameters()

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        out_features, in_features = self.spec.shape
        shared = self.shared[0]
        a, b = shared.vera_A[:, :in_features], shared.vera_B[:out_features]
        return a.to(device), b.to(device)  # where the layers are spread over several

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + lambda_b * (B (lambda_d * (A dropout(x)))), in y's dtype."""
        a, b = self.matrices(x.device)
        if not is_autocast(x):
            a, b = a.to(x.dtype), b.to(x.dtype)
        hidden = F.linear(self.vera_dropout(x), a)
        change = F.linear(hidden * (self.scale() * self.vera_lambda_d).to(hidden.dtype), b)
        return y + (change * self.vera_lambda_b.to(change.dtype)).to(y.dtype)

    def delta_weight(self) -> Tensor:
        """The update diag(lambda_b) B diag(lambda_d) A, (out, in)."""
        a, b = self.matrices(self.vera_lambda_b.device)
        update = (b * (self.scale() * self.vera_lambda_d)) @ a
        return self.vera_lambda_b[:, None] * update

    def extra_repr(self) -> str:
        """The rank, as it appears in `print(model)`."""
        return f"r={len(self.vera_lambda_d)}"
