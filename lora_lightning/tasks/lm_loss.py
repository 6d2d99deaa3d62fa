"""The loss of a language model: cross-entropy of learned tokens alone, with little memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from lora_lightning.tasks.chunked_cross_entropy import Head, head_loss, widened
from lora_lightning.training.messages import rank_zero_info
from lora_lightning.utilities.constants import IGNORE_INDEX
from lora_lightning.utilities.dtensor import is_sharded
from lora_lightning.utilities.rng import random_state, set_random_state
from lora_lightning.utilities.wrappers import unwrapped

# How configs name what a model does to scores after its head.
MULTIPLIED = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, ...
DIVIDED = ("logits_scaling",)  # Granite
SOFT_CAPPED = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, ...


def next_tokens(labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Shift labels: each position of a causal LM predicts the label after it, or `IGNORE_INDEX`.

    Args:
        labels: (B, T), each at the place of its token.
        position_ids: (B, T), 0 where a sequence begins among several that are packed: the one
            before it does not predict its first token.
    """
    if position_ids is not None:
        labels = labels.masked_fill(position_ids == 0, IGNORE_INDEX)
    return pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the learned tokens of a batch.

    Attributes:
        total: Cross-entropy, in float32 or wider.
        correct: How many tokens have the highest score; None where gradients are computed.
        balance: A mixture of experts' auxiliary loss (a mean), with its coefficient, where the
            model's config asks for it (`output_router_logits`); else None.
    """

    total: Tensor
    correct: Tensor | None
    balance: Tensor | None = None


class LMLoss:
    """Computes `TokenLoss` of a network of transformers with an output head.

    The network runs as ever, and all that hangs on its call with it (FSDP, DeepSpeed, hooks), but
    when it calls its head it is held up: the loss is computed there and then, from those hidden
    states that predict a learned token, in chunks (`head_loss`). The head itself is left with the
    first position of each row. Adapters on it, tied weights and biases act as they always do. What
    the network does to scores after the head is taken from its config, and at first use compared
    with the scores of that first position; a network that does something else is given its loss by
    all its scores.

    A network that is compiled must be so below its head (`network.base_model.compile()`).
    """

    def __init__(self) -> None:
        self.by_chunks: bool | None = None  # not known before the first use

    def __call__(self, network: Any, inputs: dict[str, Any], targets: Tensor) -> TokenLoss:
        """The loss of a batch.

        Args:
            network: With `get_output_embeddings`.
            inputs: Of the network, without labels.
            targets: (B, T): what each position of the decoder's output predicts, or `IGNORE_INDEX`.
        """
        if self.by_chunks is not False and (found := self._by_chunks(network, inputs, targets)):
            return found
        outputs = network(**inputs)
        learned = targets != IGNORE_INDEX
        wide, wanted = widened(outputs.logits[learned]), targets[learned]
        correct = None if torch.is_grad_enabled() else (wide.argmax(dim=-1) == wanted).sum()
        total = cross_entropy(wide, wanted, reduction="sum")
        return TokenLoss(total, correct, _balance(network, outputs))

    def _by_chunks(self, network: Any, inputs: dict[str, Any], targets: Tensor) -> TokenLoss | None:
        head = unwrapped(network.get_output_embeddings())
        if head is None:
            self.by_chunks = False
            _say_so(network)
            return None
        finish = Finish(network)
        found: list[tuple[Tensor, Tensor | None]] = []
        first_scores: list[Tensor] = []

        def instead_of_head(module: nn.Module, args: tuple[Any, ...]) -> Any:
            # `forward`: what comes before it, such as gathering weights, has been done.
            hidden, first = args[0], args[0][:, :1]

            def scores_of(states: Tensor) -> Tensor:
                return finish(module.forward(states))

            if hidden.shape[:-1] != targets.shape:
                return None
            found.append(_summed(scores_of, hidden, targets))
            if self.by_chunks is None:
                # The head is about to be called with the same, and to draw the same dropout.
                state = random_state(cuda="own")
                with torch.no_grad():
                    first_scores.append(scores_of(first))
                set_random_state(state)
            return (first, *args[1:])

        handle = head.register_forward_pre_hook(instead_of_head)
        try:
            outputs = network(**inputs)
        finally:
            handle.remove()
        as_expected = len(found) == 1
        if self.by_chunks is None:
            self.by_chunks = as_expected and _close(outputs.logits, first_scores[0])
            as_expected = self.by_chunks
            if not as_expected:
                _say_so(network)
        if not as_expected:
            return None
        total, correct = found[0]
        if torch.is_grad_enabled() and any(is_sharded(p) for p in network.parameters()):
            # FSDP2 awaits gradients at what its root returns.
            total = total + outputs.logits.flatten()[:0].sum()
        return TokenLoss(total, correct, _balance(network, outputs))


class Finish:
    """Operations of a network on its head's scores: scale, soft cap c tanh(z / c), bias."""

    def __init__(self, network: Any) -> None:
        config = network.config.get_text_config(decoder=True)
        self.scale = 1.0
        for names, power in ((MULTIPLIED, 1), (DIVIDED, -1)):
            for name in names:
                value = getattr(config, name, None)
                self.scale *= float(value) ** power if isinstance(value, (int, float)) else 1.0
        caps = (getattr(config, name, None) for name in SOFT_CAPPED)
        self.cap = next((float(cap) for cap in caps if cap), None)
        self.bias = getattr(network, "final_logits_bias", None)

    def __call__(self, scores: Tensor) -> Tensor:
        """Apply them to scores (..., vocabulary), in float32 or wider."""
        scores = widened(scores)
        if self.scale != 1:
            scores = scores * self.scale
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        return scores if self.bias is None else scores + self.bias[0]


def _summed(scores_of: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    learned = targets != IGNORE_INDEX
    states, wanted = hidden[learned], targets[learned]
    if len(states):
        return head_loss(scores_of, states, wanted)
    # One token that counts for nothing: other processes have some, and wait for all gradients.
    total, correct = head_loss(scores_of, hidden[:1, 0], torch.zeros_like(targets[:1, 0]))
    return total * 0, None if correct is None else correct * 0


def _balance(network: Any, outputs: Any) -> Tensor | None:
    loss = getattr(outputs, "aux_loss", None)
    if loss is None:
        return None
    config = network.config.get_text_config(decoder=True)
    coefficient = getattr(network, "router_aux_loss_coef", None)
    balance: Tensor = loss * (config.router_aux_loss_coef if coefficient is None else coefficient)
    return balance


def _close(found: Tensor, expected: Tensor) -> bool:
    """True if scores agree but for the few roundings of what follows the head."""
    if found.shape != expected.shape:
        return False
    difference = (found.to(expected.dtype) - expected).abs().max()
    roundings = 2 if found.dtype.itemsize == 2 else 8
    return bool(difference <= roundings * torch.finfo(found.dtype).eps * expected.abs().max())


def _say_so(network: Any) -> None:
    rank_zero_info(
        f"{type(network).__name__} does something to its scores that the chunked loss does not "
        "know: the loss is computed from all scores at once, with more memory."
    )
