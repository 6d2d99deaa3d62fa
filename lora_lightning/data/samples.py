"""What a row of text data can be, and what is learned from it: the words all text rooms share."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

# A label that the loss leaves out (torch's and transformers' value).
IGNORED = -100


@dataclass(frozen=True)
class Document:
    """Plain text, trained on as a whole."""

    text: str
    where: str


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt, which is only read, and the completion, which is learned."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Chat:
    """A conversation as `tokenizer.apply_chat_template` takes it; each assistant turn is learned.

    Attributes:
        messages: They hold `role` and `content`, and what else the template reads (`tool_calls`).
        where: Where the conversation stands.
        tools: What the assistant may call.
        unlearned: Indices of the assistant's messages that are only read.
    """

    messages: tuple[dict[str, Any], ...]
    where: str
    tools: tuple[Any, ...] = ()
    unlearned: tuple[int, ...] = ()


Sample = Document | PromptCompletion | Chat


@dataclass(frozen=True)
class Example:
    """Token ids.

    Attributes:
        input_ids: What the model reads.
        labels: For a causal LM as many as `input_ids`: labels[i] is input_ids[i] where that token
            is learned (from the tokens before it: the loss shifts), else `IGNORED`. For an
            encoder-decoder the ids of the target, of a length of its own.
    """

    input_ids: list[int]
    labels: list[int]
