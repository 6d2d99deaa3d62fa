"""Chats as text: what the tokenizer's template writes, and which parts of it are learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lightning.data.samples import Chat
from lora_lightning.errors import ConfigError, RecordError, did_you_mean

Message = dict[str, Any]
Span = tuple[int, int]
# A text, and the spans of it that are learned.
Marked = tuple[str, list[Span]]

# Around what the model generates, in templates that say so themselves.
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Writes chats by a template and finds what the model itself writes in them.

    That is every assistant turn, but for those that the chat says are only read: from where the
    generation prompt ends (`add_generation_prompt`) to the token that ends the turn, this token
    included and white space after it not. A template with `{% generation %}` blocks says where
    turns begin and end; the token that ends a turn is learned also where a block leaves it out.

    Some templates rewrite earlier turns (Qwen3's takes their thinking away). Then a later turn's
    context is not what the model wrote, and each turn becomes a text of its own with the context
    that it has when the model writes it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: A file with Jinja or the Jinja itself, the name of one of the tokenizer's
            templates, or None for its default.
        options: What else the template reads (`enable_thinking`).
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template and _read_template(template, tokenizer)
        self._options = dict(options or {})
        added = tokenizer.added_tokens_decoder.values()
        self._added = tuple(token.content for token in added)
        special = {token.content for token in added if token.special}
        self._special = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)

    def texts(self, chat: Chat) -> list[Marked]:
        """One text or, where the template rewrites earlier turns, several; [] without a turn.

        What follows the last turn that is learned is left out.
        """
        messages = _without_nulls(chat)
        spoken = [number for number, m in enumerate(messages) if m.get("role") == "assistant"]
        turns = [number for number in spoken if number not in chat.unlearned]
        marked = bool(turns) and _GENERATION_BLOCK.search(self._source(chat))
        find = self._marked_turn if marked else self._turn
        texts: list[Marked] = []
        for turn in turns:
            text, spans = find(chat, messages, turn)
            if texts and text.startswith(texts[-1][0]):
                texts[-1] = text, [*texts[-1][1], *spans]
            else:
                texts.append((text, spans))
        return texts

    def prompt(self, chat: Chat) -> str:
        """What the model reads to write the next turn."""
        self._source(chat)
        return self._render(chat, _without_nulls(chat), add_generation_prompt=True)

    def ends_a_turn(self, text: str) -> bool:
        """Whether `text` ends in a token that can tell the model to stop."""
        return text.endswith(self._added)

    def _turn(self, chat: Chat, messages: list[Message], turn: int) -> Marked:
        """The text up to the end of message number `turn`, and where that message is in it."""
        text = self._render(chat, messages[: turn + 1])
        if turn:
            prompt = self._render(chat, messages[:turn], add_generation_prompt=True)
        else:
            prompt = self._prompt_of_first_turn(chat, text)
        if not text.startswith(prompt):
            common = _common_start(prompt, text)
            raise RecordError(
                f"{chat.where}, message {turn + 1}: the chat template lets the model write this "
                f"turn after {prompt[common:][:40]!r}, but the turn itself begins with "
                f"{text[common:][:40]!r} there, so it cannot be learned as it would be generated. "
                "Put into the message what belongs there (such as its thinking), or give another "
                "template. (data.chat_template)"
            )
        end = self._end_of_turn(text, (len(prompt), len(text)))
        return text[:end], [(len(prompt), end)]

    def _marked_turn(self, chat: Chat, messages: list[Message], turn: int) -> Marked:
        """As `_turn`, by the blocks of the template that are not of earlier messages."""
        text, blocks = self._render_blocks(chat, messages[: turn + 1])
        earlier = _common_start(self._render(chat, messages[:turn]), text) if turn else 0
        spans = [
            (start, self._end_of_turn(text, (start, end)))
            for start, end in blocks
            if start >= earlier
        ]
        if not spans:
            raise RecordError(
                f"{chat.where}, message {turn + 1}: the chat template has {{% generation %}} "
                "blocks, but none marks this turn. Mark every assistant turn, or take the blocks "
                "out: then all are learned. (data.chat_template)"
            )
        return text[: spans[-1][1]], spans

    def _prompt_of_first_turn(self, chat: Chat, text: str) -> str:
        """The start of a chat that the assistant opens: no template writes an empty chat."""
        user = [{"role": "user", "content": "?"}]
        asked = self._render(chat, user)
        header = self._render(chat, user, add_generation_prompt=True).removeprefix(asked)
        start = text.find(header)
        if not header or start < 0:
            raise RecordError(
                f"{chat.where}: the chat begins with an assistant turn, and the chat template "
                "does not show where the model would begin to write it. Begin with a system or "
                "user message. (data.chat_template)"
            )
        return text[: start + len(header)]

    def _end_of_turn(self, text: str, span: Span) -> int:
        """Where the token that ends the turn ends; where `span` does if there is no such token."""
        start, end = span
        body = text[start:end].rstrip()
        if body.endswith(self._added):
            return start + len(body)
        after = next((token for token in self._special if text.startswith(token, end)), "")
        return end + len(after)

    def _source(self, chat: Chat) -> str:
        try:
            return self._tokenizer.get_chat_template(self._template, list(chat.tools) or None)
        except ValueError as error:
            raise ConfigError(
                f"{chat.where} is a chat, but the tokenizer of "
                f"{self._tokenizer.name_or_path!r} has no chat template that is used by default. "
                "Name a file with one, or take a model that was trained on chats (often named "
                "-Instruct or -it). (data.chat_template)"
            ) from error

    def _render(self, chat: Chat, messages: list[Message], **options: Any) -> str:
        with _template_errors(chat.where):
            return self._tokenizer.apply_chat_template(
                messages,
                tools=list(chat.tools) or None,
                chat_template=self._template,
                tokenize=False,
                **{**self._options, **options},
            )

    def _render_blocks(self, chat: Chat, messages: list[Message]) -> tuple[str, Sequence[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        with _template_errors(chat.where):
            # apply_chat_template gives a mask of tokens only, and an empty one for some blanks.
            rendered: Any = render_jinja_template(
                [messages],
                tools=list(chat.tools) or None,
                chat_template=self._source(chat),
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self._options},
            )
        texts, blocks = rendered
        return texts[0], blocks[0]


def _without_nulls(chat: Chat) -> list[Message]:
    # As apply_chat_template does; many templates would write "None".
    return [{key: v for key, v in m.items() if v is not None} for m in chat.messages]


def _common_start(text: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(text), len(other)))


@contextmanager
def _template_errors(where: str) -> Iterator[None]:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is no valid Jinja, line {error.lineno}: {error.message}. "
            "(data.chat_template)"
        ) from error
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        advice = (
            "Write the system message's text at the start of the first user message"
            if "system" in str(error).lower()
            else "Change the messages"
        )
        raise RecordError(
            f"{where}: the chat template refuses this chat: {error}. {advice}, or give a template "
            "that takes it. (data.chat_template)"
        ) from error


def _read_template(template: str, tokenizer: Any) -> str:
    """Jinja, or the name of one of the tokenizer's templates."""
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if "{" in template or template in own:
        return template
    path = Path(template).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    beside = (
        [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    )
    near = did_you_mean(template, [*beside, *own])
    hint = f" Did you mean {near!r}?" if near else ""
    raise ConfigError(
        f"chat_template {template!r} is no file, no Jinja, and no template of the tokenizer.{hint} "
        "(data.chat_template)"
    )
