"""Text as it is generated, and an answer that can be stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """A streamer for transformers' `generate`: hands on what each token adds to the text.

    All that is handed on, put together, is what the tokenizer decodes of all tokens, special ones
    left out: they are decoded together each time, as the text of one may depend on those before it.
    A character of which only some bytes are there waits for the others.

    Args:
        tokenizer: Decodes.
        ends: Ids that end the text and are no part of it.
        show: Is given the pieces.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], show: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, ends, show
        self._ids: list[int] = []
        self._shown = ""
        self._begun = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, at the first call, then token by token."""
        if not self._begun:
            self._begun = True
            return
        self._ids += [id_ for id_ in value.flatten().tolist() if id_ not in self._ends]
        self._hand_on(self._text().rstrip("\ufffd"))

    def end(self) -> None:
        """Hand on what is left."""
        text = self._text()
        if not text.startswith(self._shown):  # a decoder that tidies up words it had written
            self._show("\n")
            self._shown = ""
        self._hand_on(text)

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _hand_on(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


class Stop:
    """A stopping criterion of transformers' `generate`: at the next token once it is `asked` for.

    Attributes:
        asked: Whether it is.
    """

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Tell for each row whether it has ended."""
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)

    @contextmanager
    def at_interrupt(self) -> Iterator[None]:
        """Inside, Ctrl-C asks for it; pressed again it interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(*_: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
