"""LoRA on an embedding table.

E' = E + scaling * (B A)^T,  A (r, num_embeddings), B (embedding_dim, r).

Source: Hu et al. 2021, arXiv:2106.09685; names, shapes and start values are PEFT's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lora_lightning.adapters.base import AdapterSpec, BaseWeight, DeltaAdapter
from lora_lightning.adapters.initialization import constant_, normal_
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.lora.linear import LowRankAdapter
from lora_lightning.errors import ConfigError
from lora_lightning.utilities.autocast import without_autocast


class LoraEmbeddingAdapter(LowRankAdapter):
    """y + scaling * (B A)^T[ids].

    Here A starts at zero and B random; rows of tokens that never occur stay unchanged.

    Shapes:
        ids (...) of integers, y (..., embedding_dim) -> (..., embedding_dim);
        lora_embedding_A (r, num_embeddings); lora_embedding_B (embedding_dim, r).

    """

    def __init__(self, spec: AdapterSpec) -> None:
        check_plain_start(spec)
        num_embeddings, embedding_dim = spec.shape
        super().__init__(spec)
        self.lora_embedding_A = spec.parameter(self.r, num_embeddings)
        self.lora_embedding_B = spec.parameter(embedding_dim, self.r)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A zero and B ~ N(0, 1); both random where `init_lora_weights` is false."""
        DeltaAdapter.reset_parameters(self)
        if self.config.init_lora_weights is False:
            normal_(self.lora_embedding_A, 1.0, self.spec.generator("lora_embedding_A"))
        else:
            constant_(self.lora_embedding_A, 0)
        normal_(self.lora_embedding_B, 1.0, self.spec.generator("lora_embedding_B"))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, num_embeddings) and B (embedding_dim, r)."""
        return self.lora_embedding_A, self.lora_embedding_B

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The table with its columns as rows: (embedding_dim, num_embeddings)."""
        return weight.t()

    def update(self, x: Tensor, base: BaseWeight) -> Tensor:
        """The rows scaling * (B A)^T[ids], looked up as the base looks up its own."""
        rows = base.apply_weight(x, self.lora_embedding_A.t())
        # Autocast does not narrow an embedding lookup, so it must not narrow its update either.
        with without_autocast(x):
            return F.linear(rows, self.lora_embedding_B) * self.scale()

    def delta_weight(self) -> Tensor:
        """scaling * (B A)^T, (num_embeddings, embedding_dim)."""
        return self.scale() * (self.lora_embedding_B @ self.lora_embedding_A).t()


def check_plain_start(spec: AdapterSpec) -> None:
    """Refuse options that are defined for linear maps only.

    Raises:
        ConfigError: Naming the option and the module.

    """
    config: LoraConfig = spec.config
    path, kind = spec.path, spec.kind
    if config.lora_bias and kind == "embedding":
        raise ConfigError(f"lora_bias has no meaning on the {kind} {path!r}. (lora.lora_bias)")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} is defined for Linear modules, but "
            f"{path!r} is of kind {kind!r}. Leave it out (lora.exclude_modules), or use true "
            "or 'gaussian'. (lora.init_lora_weights)"
        )
