"""Single rows of a table that train in full: new tokens of a grown vocabulary, say.

E'[i] = delta[k] where i is the k-th trained token, E'[i] = E[i] elsewhere. Of an embedding only the
rows in the batch are looked up; of a head (a Linear) the outputs for these tokens are x delta^T
(+ their biases). The table is never copied. What is tied to it gets the same rows.

The same as PEFT's `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.adapters.base import Adapter, AdapterSpec, BaseWeight
from lora_lightning.errors import ConfigError
from lora_lightning.utilities.autocast import is_autocast
from lora_lightning.utilities.dtensor import copy_full


class TrainableTokensAdapter(Adapter):
    """Trained rows of an embedding or a head.

    Shapes:
        trainable_tokens_delta (n, embedding_dim or in_features): the rows themselves, in the order
            of the ids.

    """

    needs_weight = True
    file_names: ClassVar[dict[str, str]] = {
        "trainable_tokens_delta": "token_adapter.trainable_tokens_delta"
    }

    def __init__(self, spec: AdapterSpec, token_ids: Sequence[int]) -> None:
        super().__init__(spec)
        check_token_ids(token_ids, spec.shape[0], spec.path)
        self.token_ids = list(token_ids)
        self.trainable_tokens_delta = spec.parameter(len(self.token_ids), spec.shape[1])
        for name in ("ids", "sorted_ids", "order"):
            empty = torch.empty(len(self.token_ids), dtype=torch.long, device=spec.device)
            self.register_buffer(name, empty, persistent=False)
        self.reset_parameters()

    ids: Tensor
    sorted_ids: Tensor
    order: Tensor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The ids; the rows are the table's own as soon as `start_from_weight` has seen it."""
        super().reset_parameters()
        self.ids.copy_(torch.tensor(self.token_ids))
        sorted_ids, order = torch.tensor(self.token_ids).sort()
        self.sorted_ids.copy_(sorted_ids)
        self.order.copy_(order)
        self.trainable_tokens_delta.zero_()

    @torch.no_grad()
    def start_from_weight(self, weight: Tensor) -> None:
        """The rows start as those of the table."""
        copy_full(self.trainable_tokens_delta, weight[self.token_ids])

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """The rows y of token ids x, or outputs y of a head, those of trained tokens exchanged."""
        return self.exchanged(x, y, base)

    def exchanged(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """The same for another weight that is tied to this one (T5 has several tables)."""
        return self._outputs(x, y, base) if x.is_floating_point() else self._looked_up(x, y, base)

    def _looked_up(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        place = torch.searchsorted(self.sorted_ids, x).clamp(max=len(self.token_ids) - 1)
        trained = self.sorted_ids[place] == x
        rows = F.embedding(self.order[place], self.trainable_tokens_delta)
        rows = (rows * getattr(base.layer, "embed_scale", 1.0)).to(y.dtype)
        return torch.where(trained.unsqueeze(-1), rows, y)

    def _outputs(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        delta: Tensor = self.trainable_tokens_delta
        if not is_autocast(x):
            delta = delta.to(x.dtype)
        bias = None if base.bias is None else base.bias[self.ids]
        return y.index_copy(-1, self.ids, F.linear(x, delta, bias).to(y.dtype))

    def transform_weight(self, weight: Tensor, base: BaseWeight) -> Tensor:
        """The table with the trained rows."""
        rows = self.trainable_tokens_delta.to(weight.dtype)
        return weight.index_copy(0, self.ids, rows)

    def extra_repr(self) -> str:
        """Number of tokens that train, as it appears in `print(model)`."""
        return f"tokens={len(self.token_ids)}"


class TiedTrainableTokensAdapter(Adapter):
    """The same rows in a head, or another table, that shares the weight; it owns no tensor."""

    def __init__(self, rows: TrainableTokensAdapter) -> None:
        super().__init__(rows.spec)
        self._rows = (rows,)  # in a tuple: not a child, so its tensor is found once

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """As the adapter that owns the rows."""
        return self._rows[0].exchanged(x, y, base)


def check_token_ids(token_ids: Sequence[int], size: int, path: str) -> None:
    """Refuse ids that the table does not have.

    Raises:
        ConfigError: Naming the id and the table.

    """
    for token in token_ids:
        if not 0 <= token < size:
            raise ConfigError(
                f"trainable_token_indices names token {token}, but {path!r} has {size} rows. "
                "Resize the embeddings first. (lora.trainable_token_indices)"
            )
