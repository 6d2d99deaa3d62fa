"""Labels of a chat: which parts of its text are learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_lightning.data.encoding.chat_template import ChatTemplate, Message, Span
from lora_lightning.data.samples.sample import Chat
from lora_lightning.errors import LoraError, RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A text, and the spans of it that are learned.
Marked = tuple[str, list[Span]]
_THINKING = ("reasoning_content", "reasoning", "thinking")


class ChatTurns:
    """Finds what the model itself writes in the text of a chat.

    That is every assistant turn, but for those that the chat says are only read: from where the
    generation prompt ends (`add_generation_prompt`) to the token that ends the turn, this token
    included and white space after it not. In a template with `{% generation %}` blocks these say
    what of a turn is learned; the token that ends it is, also where a block leaves it out.

    Some templates rewrite earlier turns (Qwen3's takes their thinking away). Then a later turn's
    context is not what the model wrote, and each turn becomes a text of its own with the context
    that it has when the model writes it.

    Added tokens of the tokenizer can end a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self._template = template
        added = tokenizer.added_tokens_decoder.values()
        self._added = tuple(token.content for token in added)
        self._longest = sorted(self._added, key=len, reverse=True)
        special = {token.content for token in added if token.special}
        self._special = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._ids = tokenizer.convert_tokens_to_ids
        self._ends: set[str] = set()
        self._plain_end: str | None = None  # of a turn of words only; "" where it has none

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens that ended the turns so far, each by the first one that does."""
        found: Any = self._ids(sorted(self._ends))
        return sorted(found)

    def texts(self, chat: Chat) -> list[Marked]:
        """One text or, where the template rewrites earlier turns, several; [] without a turn.

        What follows the last turn that is learned is left out.
        """
        messages = _without_nulls(chat)
        spoken = [number for number, m in enumerate(messages) if m.get("role") == "assistant"]
        texts: list[Marked] = []
        for turn in spoken:
            if turn in chat.unlearned:
                continue
            text, spans = self._turn(chat, messages[:turn], messages[turn])
            if texts and text.startswith(texts[-1][0]):
                texts[-1] = text, [*texts[-1][1], *spans]
            else:
                texts.append((text, spans))
        return texts

    def prompt(self, chat: Chat) -> str:
        """Render what the model reads to write the next turn."""
        return self._template.render(chat, _without_nulls(chat), ask=True)

    def ends_a_turn(self, text: str) -> bool:
        """True if `text` ends in a token that can tell the model to stop."""
        return text.endswith(self._added)

    def _turn(self, chat: Chat, before: list[Message], message: Message) -> Marked:
        """The text up to the end of `message`, and what of it the model writes."""
        where = f"{chat.where}, message {len(before) + 1}"
        by = self._by_blocks if self._template.marks_turns(chat) else self._by_prompt
        text, spans = by(chat, before, message, where)
        *others, (start, end) = spans
        end = self._end_of_turn(text, start, end)
        if found := self._end_token(text[start:end]):
            self._ends.add(found)
        for lost in _lost(message, text[spans[0][0] :]):
            raise RecordError(
                f"{where}: the chat template does not write this turn's {lost}, so it cannot be "
                "learned. Take it out of the message, or give a template that writes it. "
                "(data.chat_template)"
            )
        return text[:end], [*others, (start, end)]

    def _by_prompt(self, chat: Chat, before: list[Message], message: Message, where: str) -> Marked:
        text = self._template.render(chat, [*before, message])
        prompt = self._prompt_of_turn(chat, before, text)
        if not text.startswith(prompt):
            common = _common_start(prompt, text)
            raise RecordError(
                f"{where}: the chat template lets the model write this turn after "
                f"{prompt[common:][:40]!r}, but the turn itself begins with "
                f"{text[common:][:40]!r} there, so it cannot be learned as it would be generated. "
                "Put into the message what belongs there (reasoning_content), set what the "
                "template reads (data.chat_template_kwargs, such as enable_thinking: false), or "
                "give another template. (data.chat_template)"
            )
        return text, [(len(prompt), len(text))]

    def _by_blocks(self, chat: Chat, before: list[Message], message: Message, where: str) -> Marked:
        text, blocks = self._template.render_blocks(chat, [*before, message])
        start = 0
        if before:
            prompt = self._template.render(chat, before, ask=True)
            if text.startswith(prompt):
                start = len(prompt)
            else:  # then the blocks say where the turn begins
                start = _common_start(self._template.render(chat, before), text)
        spans = [(max(first, start), end) for first, end in blocks if end > start]
        if not spans:
            raise RecordError(
                f"{where}: the chat template has {{% generation %}} blocks, but none marks this "
                "turn. Mark every assistant turn, or take the blocks out: then all are learned. "
                "(data.chat_template)"
            )
        return text, spans

    def _prompt_of_turn(self, chat: Chat, before: list[Message], text: str) -> str:
        if before:
            return self._template.render(chat, before, ask=True)
        # No template writes an empty chat, so the header is found in another.
        user = [{"role": "user", "content": "?"}]
        asked = self._template.render(chat, user)
        header = self._template.render(chat, user, ask=True).removeprefix(asked)
        start = text.find(header)
        if not header or start < 0:
            raise RecordError(
                f"{chat.where}: the chat begins with an assistant turn, and the chat template "
                "does not show where the model would begin to write it. Begin with a system or "
                "user message. (data.chat_template)"
            )
        return text[: start + len(header)]

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Find the end of the token that ends the turn; `end` if there is no such token."""
        body = text[start:end].rstrip()
        if body.endswith(self._added):
            return start + len(body)
        after = next((token for token in self._special if text.startswith(token, end)), "")
        return end + len(after)

    def _end_token(self, body: str) -> str:
        """The token at which the model is to stop: the first of those that end a turn; or "".

        Phi-3 writes `<|end|>`, and its end of sequence behind the last turn only. What ends a part
        of a turn, such as a tool call, may be a special token, too: where the token that ends
        a turn of words is among the last ones, it is that.
        """
        if self._plain_end is None:
            self._plain_end = ""  # while it is looked for
            user, reply = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
            probe = Chat((user, reply), "a chat of one question")
            try:
                text = self._template.render(probe, [user, reply])
            except LoraError:  # not every template takes so short a chat
                text = ""
            self._plain_end = self._end_token(text.rpartition("!")[2])
        tokens: list[str] = []  # at the end of the turn, the last one first
        body = body.rstrip()
        while token := next((t for t in self._longest if body.endswith(t)), ""):
            tokens.append(token)
            body = body.removesuffix(token).rstrip()
        if self._plain_end in tokens:
            return self._plain_end
        return next((t for t in reversed(tokens) if t in self._special), (*tokens, "")[0])


def template_end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token with which the tokenizer's chat template ends a turn; none where it has none."""
    turns = ChatTurns(tokenizer, ChatTemplate(tokenizer))
    asked = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    try:
        turns.texts(Chat(asked, "a chat of one question"))
    except LoraError:
        return []
    return turns.end_tokens


def _without_nulls(chat: Chat) -> list[Message]:
    # As apply_chat_template does; many templates would write "None".
    return [{key: v for key, v in m.items() if v is not None} for m in chat.messages]


def _common_start(text: str, other: str) -> int:
    """Count the characters that both begin with."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(text), len(other)))


def _lost(message: Message, written: str) -> Iterator[str]:
    """Name what of a turn the template did not write; not all templates know all keys."""
    content = message.get("content")
    if isinstance(content, str):
        # Templates write or drop the thinking in it, which may also begin in the prompt, and trim.
        answer = content.rpartition("</think>")[2].strip()
        if answer.rpartition("\n")[2] not in written:
            yield "content"
    thoughts = (message.get(key) for key in _THINKING)
    if any(isinstance(t, str) and t.strip() not in written for t in thoughts):
        yield "thinking"
    calls = (call.get("function", call) for call in message.get("tool_calls", ()))
    if any(call.get("name", "") not in written for call in calls):
        yield "tool calls"
