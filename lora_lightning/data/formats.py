"""What the columns of a row mean: from a row of a file to a sample of text to learn.

| format | columns | known from |
|---|---|---|
| `text` | `text` | datasets, TRL |
| `prompt-completion` | `prompt`, `completion`: strings, or lists of messages | OpenAI, TRL |
| `alpaca` | `instruction`, `input` (may be empty or missing), `output` | Stanford Alpaca |
| `messages` | `messages`: a list of `role` and `content`; `tools` | OpenAI, TRL |
| `sharegpt` | `conversations`: a list of `from` and `value`; `system`, `tools` | ShareGPT |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.data.messages import Message, described, read_messages, read_tools
from lora_lightning.data.row import Row
from lora_lightning.data.samples import Chat, Document, PromptCompletion, Sample
from lora_lightning.errors import ConfigError, RecordError, did_you_mean, first_few

# The layout of the Alpaca release (github.com/tatsu-lab/stanford_alpaca), to the line break after
# "Response:", as in the `text` column of the data set.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Fields:
    """The columns of one row under the names of its format, with errors that say where."""

    def __init__(self, row: Row, columns: Mapping[str, str], form: str) -> None:
        self.where = row.where
        self._values, self._columns, self._form = row.values, columns, form

    def column(self, field: str) -> str:
        """The row's own name of `field`."""
        return self._columns.get(field, field)

    def place(self, field: str) -> str:
        """Where `field` stands, for error messages."""
        return f"{self.where}, key {self.column(field)!r}"

    def optional(self, field: str) -> Any:
        """The value; None where there is none."""
        return self._values.get(self.column(field))

    def required(self, field: str) -> Any:
        """The value, which may be None."""
        column = self.column(field)
        if column not in self._values:
            near = did_you_mean(column, self._values)
            hint = f" Did you mean {near!r}?" if near else ""
            raise RecordError(
                f"{self.where}: no key {column!r}, which the format {self._form!r} needs. Keys "
                f"found: {first_few(self._values, 20)}.{hint} Name the right one. (data.columns)"
            )
        return self._values[column]

    def text(self, field: str, *, empty: bool = False) -> str:
        """A string; an `empty` one only where that makes sense."""
        value = self.required(field)
        if not isinstance(value, str):
            raise RecordError(f"{self.place(field)}: must be a string, found {described(value)}.")
        if not empty and not value.strip():
            raise RecordError(f"{self.place(field)}: is empty. Remove the row or fill it in.")
        return value


def _document(fields: Fields, chat: bool) -> Sample:
    return Document(fields.text("text"), fields.where)


def _prompt_completion(fields: Fields, chat: bool) -> Sample:
    if isinstance(fields.required("prompt"), list):
        prompt, completion = (
            read_messages(fields.required(field), fields.place(field))
            for field in ("prompt", "completion")
        )
        return _conversation((*prompt, *completion), fields)
    return PromptCompletion(
        fields.text("prompt", empty=True), fields.text("completion"), fields.where
    )


def _alpaca(fields: Fields, chat: bool) -> Sample:
    instruction, output = fields.text("instruction"), fields.text("output")
    given = "" if fields.optional("input") is None else fields.text("input", empty=True)
    if chat:
        content = f"{instruction}\n\n{given}" if given.strip() else instruction
        return Chat(
            ({"role": "user", "content": content}, {"role": "assistant", "content": output}),
            fields.where,
        )
    layout = ALPACA_PROMPT_WITH_INPUT if given.strip() else ALPACA_PROMPT
    prompt = layout.format(instruction=instruction, input=given)
    return PromptCompletion(prompt, output, fields.where)


def _messages(fields: Fields, chat: bool) -> Sample:
    messages = read_messages(fields.required("messages"), fields.place("messages"))
    return _conversation(messages, fields)


def _sharegpt(fields: Fields, chat: bool) -> Sample:
    messages = read_messages(fields.required("conversations"), fields.place("conversations"))
    if fields.optional("system"):
        messages = ({"role": "system", "content": fields.text("system")}, *messages)
    return _conversation(messages, fields)


def _conversation(messages: tuple[Message, ...], fields: Fields) -> Chat:
    # In which order roles may follow each other is the template's matter: an assistant that speaks
    # first, for instance, greets.
    if all(message["role"] != "assistant" for message in messages):
        raise RecordError(
            f"{fields.where}: no turn of the assistant, so there is nothing to learn. Remove the "
            "row or complete it."
        )
    tools = read_tools(fields.optional("tools"), fields.place("tools"))
    return Chat(messages, fields.where, tools)


@dataclass(frozen=True)
class Format:
    """How rows of one kind are read: the columns they must and may have, and what they become."""

    required: tuple[str, ...]
    read: Callable[[Fields, bool], Sample]
    optional: tuple[str, ...] = ()

    def knows(self, fields: Iterable[str]) -> bool:
        """Whether all `fields` are of this format."""
        return set(fields) <= {*self.required, *self.optional}


FORMATS = {
    "text": Format(("text",), _document),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion, ("tools",)),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input",)),
    "messages": Format(("messages",), _messages, ("tools",)),
    "sharegpt": Format(("conversations",), _sharegpt, ("system", "tools")),
}


def read_samples(
    rows: Iterable[Row],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
) -> Iterator[Sample]:
    """What there is to learn in `rows`, one sample a row.

    Args:
        rows: All of one format.
        format: A name out of `FORMATS`. Default: the one whose columns the first row has.
        columns: What the format's columns are called in the rows, where they are called otherwise:
            `{"prompt": "question", "completion": "answer"}`.
        chat: Make conversations of Alpaca rows (for a tokenizer with a chat template) instead of
            setting them in Alpaca's own layout.

    Raises:
        ConfigError: If `format` or `columns` name what there is not.
        RecordError: If no format or several fit the first row, or a row does not fit its format.
    """
    columns = columns or {}
    check_format(format, columns)
    for row in rows:
        format = format or recognised_format(row, columns)
        yield FORMATS[format].read(Fields(row, columns, format), chat)


def check_format(format: str | None, columns: Mapping[str, str]) -> None:
    """Refuse a format that is unknown, and columns that it does not have."""
    if format is not None and format not in FORMATS:
        near = did_you_mean(format, FORMATS)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(f"unknown format {format!r}.{hint} Formats: {_listed()}. (data.format)")
    known = [FORMATS[format]] if format else list(FORMATS.values())
    if columns and not any(each.knows(columns) for each in known):
        fields = sorted({name for each in known for name in (*each.required, *each.optional)})
        wrong = next((name for name in columns if name not in fields), None)
        near = did_you_mean(wrong, fields) if wrong else None
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"columns names {first_few(columns)}, but "
            + (f"the format {format!r} has no {wrong!r}" if format else "no format has all of them")
            + f".{hint} Formats: {_listed()}. Write FORMAT'S NAME: FILE'S NAME. (data.columns)"
        )


def recognised_format(row: Row, columns: Mapping[str, str]) -> str:
    """The one format whose columns `row` has."""
    fitting = [
        name
        for name, form in FORMATS.items()
        if form.knows(columns)
        and all(columns.get(field, field) in row.values for field in form.required)
    ]
    if len(fitting) == 1:
        return fitting[0]
    found = first_few(row.values, 20)
    if fitting:
        raise RecordError(
            f"{row.where}: its keys ({found}) fit several formats: {', '.join(fitting)}. "
            "Name the one that is meant. (data.format)"
        )
    raise RecordError(
        f"{row.where}: its keys ({found}) fit no format. Formats: {_listed()}. Name the columns of "
        'one of them, such as {"prompt": "question", "completion": "answer"}. (data.columns)'
    )


def _listed() -> str:
    return ", ".join(f"{name} ({', '.join(form.required)})" for name, form in FORMATS.items())
