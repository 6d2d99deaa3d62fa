"""The tokens at which a text ends: the model's own, and those that training taught."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def as_ids(found: Any) -> list[int]:
    """The ids of an `eos_token_id`, which may be one, several or none."""
    return [found] if isinstance(found, int) else [] if found is None else [*map(int, found)]


def stop_tokens(network: Any, learned: Collection[int]) -> list[int]:
    """The ids that end a text: those that the network's files say, and those it was taught."""
    config = getattr(network, "generation_config", None)
    return sorted({*as_ids(getattr(config, "eos_token_id", None)), *learned})


def until_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """`ids` up to the first of `ends`, which is left out: it may be no special token."""
    return [*ids[: next((n for n, id_ in enumerate(ids) if id_ in ends), len(ids))]]


def stop_line(tokenizer: PreTrainedTokenizerBase, learned: Collection[int]) -> str | None:
    """Say where generation stops, if that is not where the tokenizer says; else None."""
    eos = tokenizer.eos_token_id
    if {*learned} <= {eos}:
        return None
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(id_)) for id_ in learned)
    said = "none" if eos is None else repr(tokenizer.convert_ids_to_tokens(eos))
    return (
        f"generation stops at {names}, as the training data teach it (the tokenizer's end of "
        f"sequence: {said})"
    )


def saved_end_tokens(checkpoint: dict[str, Any]) -> list[int]:
    """Those that a checkpoint holds; none in older files.

    Raises:
        CheckpointError: If they are no ids.
    """
    found = checkpoint.get("end_tokens", [])
    if isinstance(found, list) and all(type(id_) is int and id_ >= 0 for id_ in found):
        return found
    raise CheckpointError("The checkpoint is damaged: its entry 'end_tokens' holds no token ids.")
