"""Samples of text (document, prompt with completion, chat) and encoded examples."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any


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


def prompt_and_answer(sample: Sample) -> tuple[Sample, str]:
    """Split a sample into a prompt and the data's answer; "" where there is none.

    Of a document the first eight words are asked, of a chat all before its last assistant turn.
    """
    if isinstance(sample, PromptCompletion):
        return sample, sample.completion
    if isinstance(sample, Document):
        head = re.match(r"\s*(?:\S+\s+){0,7}\S+", sample.text)
        text = head.group() if head else ""
        return replace(sample, text=text), sample.text[len(text) :]
    turns = [n for n, m in enumerate(sample.messages) if m.get("role") == "assistant"]
    learned = [n for n in turns if n not in sample.unlearned]
    end = (learned or turns or [len(sample.messages)])[-1]
    answer = "".join(str(m.get("content") or "") for m in sample.messages[end : end + 1])
    return replace(sample, messages=sample.messages[:end], unlearned=()), answer


@dataclass(frozen=True)
class Example:
    """Token ids.

    Attributes:
        input_ids: What the model reads.
        labels: For a causal LM as many as `input_ids`: labels[i] is input_ids[i] where that token
            is learned (from the tokens before it: the loss shifts), else `IGNORE_INDEX`. For an
            encoder-decoder the ids of the target, of a length of its own.
    """

    input_ids: list[int]
    labels: list[int]
