"""Chat template: find it and render messages, with errors that name the record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.data.samples.sample import Chat
from lora_lightning.data.sources.row import LONGEST_LINE, check_characters
from lora_lightning.errors import ConfigError, RecordError, nearest_hint
from lora_lightning.utilities.time_limit import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

LONGEST_RENDERING = 20.0  # seconds, for one chat

# Around what the model generates, in templates that say so themselves.
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Writes messages as text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: A file with Jinja or the Jinja itself, the name of one of the tokenizer's
            templates, or None for its default.
        options: What else the template reads (`enable_thinking`).

    Attributes:
        own: The Jinja or the name that was given; None: the tokenizer's default.
        options: As given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.own = template and read_template(template, tokenizer)
        self.options = dict(options or {})

    def marks_turns(self, chat: Chat) -> bool:
        """True if the template of this chat has `{% generation %}` blocks."""
        return _GENERATION_BLOCK.search(self._source(chat)) is not None

    def render(self, chat: Chat, messages: list[Message], *, ask: bool = False) -> str:
        """`messages`, a part of the chat's, as text.

        With `ask`, it ends in what lets the model write the next turn (`add_generation_prompt`).
        """
        self._source(chat)
        with _template_errors(chat.where):
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=list(chat.tools) or None,
                chat_template=self.own,
                add_generation_prompt=ask,
                tokenize=False,
                **self.options,
            )
        return _checked(str(rendered), chat)

    def render_blocks(self, chat: Chat, messages: list[Message]) -> tuple[str, list[Span]]:
        """`messages` as text, and where in it are `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _template_errors(chat.where):
            # apply_chat_template gives a mask of tokens only, and an empty one for some blanks.
            rendered: Any = render_jinja_template(
                [messages],
                tools=list(chat.tools) or None,
                chat_template=self._source(chat),
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self.options},
            )
        texts, blocks = rendered
        return _checked(texts[0], chat), [(start, end) for start, end in blocks[0] if start < end]

    def _source(self, chat: Chat) -> str:
        try:
            return self._tokenizer.get_chat_template(self.own, list(chat.tools) or None)
        except ValueError as error:
            raise ConfigError(
                f"{chat.where} is a chat, but the tokenizer of "
                f"{self._tokenizer.name_or_path!r} has no chat template that is used by default. "
                "Name a file with one, or take a model that was trained on chats (often named "
                "-Instruct or -it). (data.chat_template)"
            ) from error


@contextmanager
def _template_errors(where: str) -> Iterator[None]:
    from jinja2 import TemplateSyntaxError

    try:
        with time_limit(LONGEST_RENDERING):
            yield
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is no valid Jinja, line {error.lineno}: {error.message}. "
            "(data.chat_template)"
        ) from error
    except Exception as error:  # a template is a program, and raises what it wants
        reason = str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            reason = f"what it computes is without end, or {reason}"
        if isinstance(error, (MemoryError, RecursionError)):
            reason = "what it writes, or its own nesting, is without end"
        advice = "Change the messages"
        if "system" in str(error).lower():
            advice = "Write the system message's text at the start of the first user message"
        raise RecordError(
            f"{where}: the chat template refuses this chat: {reason}. {advice}, or give a template "
            "that takes it. (data.chat_template)"
        ) from error


def _checked(text: str, chat: Chat) -> str:
    place = f"{chat.where}, as the chat template writes it"
    if len(text) > LONGEST_LINE:
        raise RecordError(
            f"{place}: has {len(text):,} characters, and at most {LONGEST_LINE:,} are taken. "
            "Correct the template. (data.chat_template)"
        )
    check_characters(text, place)
    return text


def read_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Jinja, or the name of one of the tokenizer's templates."""
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if "{" in template or template in own:
        return template
    path = Path(template).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}: cannot be read as a chat template, which is a UTF-8 text of Jinja: "
                f"{error}. (data.chat_template)"
            ) from error
    beside = map(str, path.parent.iterdir()) if path.parent.is_dir() else ()
    hint = nearest_hint(template, [*beside, *own])
    raise ConfigError(
        f"chat_template {template!r} is no file, no Jinja, and no template of the tokenizer.{hint} "
        "(data.chat_template)"
    )
