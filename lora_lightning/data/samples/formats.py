"""Formats of text data: from the columns of a row to a sample.

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
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import get_worker_info

from lora_lightning.data.samples import messages
from lora_lightning.data.samples.sample import Chat, Document, PromptCompletion, Sample
from lora_lightning.data.sources.read_rows import read_rows
from lora_lightning.data.sources.row import Row, check_characters, described
from lora_lightning.errors import ConfigError, RecordError, first_few, nearest_hint
from lora_lightning.training.messages import rank_zero_info

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
    """The columns of one row under the names of its format, with errors that say where.

    `chat` and `prompts_only` as for `read_samples`.
    """

    def __init__(
        self, row: Row, form: str, columns: Mapping[str, str], chat: bool, prompts_only: bool
    ) -> None:
        self.where, self.chat, self.prompts_only = row.where, chat, prompts_only
        self._values, self._columns, self._form = row.values, columns, form

    def column(self, field: str) -> str:
        """The row's own name of `field`."""
        return self._columns.get(field, field)

    def place(self, field: str) -> str:
        """Place of `field`, for error messages."""
        return f"{self.where}, key {self.column(field)!r}"

    def optional(self, field: str) -> Any:
        """The value; None where there is none, which a column that is named must not be."""
        if field in self._columns:
            return self.required(field)
        return self._values.get(field)

    def required(self, field: str) -> Any:
        """The value, which may be None."""
        column = self.column(field)
        if column not in self._values:
            hint = nearest_hint(column, self._values)
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
        check_characters(value, self.place(field))
        if not empty and not value.strip():
            raise RecordError(f"{self.place(field)}: is empty. Remove the row or fill it in.")
        return value

    def answer(self, field: str) -> str:
        """Read a text that is learned; "" where only prompts are asked for."""
        return "" if self.prompts_only else self.text(field)


def _document(fields: Fields) -> Sample:
    text = fields.text("text")
    if fields.prompts_only:
        return PromptCompletion(text, "", fields.where)
    return Document(text, fields.where)


def _prompt_completion(fields: Fields) -> Sample:
    if not isinstance(fields.required("prompt"), list):
        prompt = fields.text("prompt", empty=True)
        return PromptCompletion(prompt, fields.answer("completion"), fields.where)
    asked = _messages_of("prompt", fields)
    answered = () if fields.prompts_only else _messages_of("completion", fields)
    return _chat(asked + answered, fields, learned_from=len(asked))


def _alpaca(fields: Fields) -> Sample:
    instruction, output = fields.text("instruction"), fields.answer("output")
    given = "" if fields.optional("input") is None else fields.text("input", empty=True)
    if fields.chat:
        asked = f"{instruction}\n\n{given}" if given.strip() else instruction
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        return Chat(tuple(turns[:1] if fields.prompts_only else turns), fields.where)
    layout = ALPACA_PROMPT_WITH_INPUT if given.strip() else ALPACA_PROMPT
    prompt = layout.format(instruction=instruction, input=given)
    return PromptCompletion(prompt, output, fields.where)


def _messages(fields: Fields) -> Sample:
    return _chat(_messages_of("messages", fields), fields)


def _sharegpt(fields: Fields) -> Sample:
    turns = _messages_of("conversations", fields)
    if fields.optional("system"):
        turns = ({"role": "system", "content": fields.text("system")}, *turns)
    return _chat(turns, fields)


def _messages_of(field: str, fields: Fields) -> tuple[messages.Message, ...]:
    return messages.read_messages(fields.required(field), fields.place(field))


def _chat(turns: tuple[messages.Message, ...], fields: Fields, learned_from: int = 0) -> Chat:
    # In which order roles may follow each other is the template's matter: an assistant that speaks
    # first, for instance, greets.
    tools = messages.read_tools(fields.optional("tools"), fields.place("tools"))
    if fields.prompts_only:
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns:
            raise RecordError(f"{fields.where}: no turn that the assistant could answer.")
        return Chat(tuple(map(messages.without_weight, turns)), fields.where, tools)
    spoken = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    unlearned = tuple(i for i in spoken if i < learned_from or turns[i].get("weight") == 0)
    if len(spoken) == len(unlearned):
        raise RecordError(
            f"{fields.where}: no turn of the assistant to learn. Complete the row or remove it."
        )
    return Chat(tuple(map(messages.without_weight, turns)), fields.where, tools, unlearned)


@dataclass(frozen=True)
class Format:
    """Columns that rows of a format must and may have, and what reads them."""

    required: tuple[str, ...]
    read: Callable[[Fields], Sample]
    optional: tuple[str, ...] = ()
    answer: str | None = None  # the required column that is not needed to ask

    def needed(self, prompts_only: bool) -> tuple[str, ...]:
        """The columns that a row must have."""
        return tuple(f for f in self.required if not (prompts_only and f == self.answer))

    def knows(self, fields: Iterable[str]) -> bool:
        """True if all `fields` are of this format."""
        return set(fields) <= {*self.required, *self.optional}


FORMATS = {
    "text": Format(("text",), _document),
    "prompt-completion": Format(
        ("prompt", "completion"), _prompt_completion, optional=("tools",), answer="completion"
    ),
    "alpaca": Format(("instruction", "output"), _alpaca, optional=("input",), answer="output"),
    "messages": Format(("messages",), _messages, optional=("tools",)),
    "sharegpt": Format(("conversations",), _sharegpt, optional=("system", "tools")),
}


def read_samples(
    rows: Iterable[Row],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    prompts_only: bool = False,
) -> Iterator[Sample]:
    """Read one sample from each row.

    A format that is recognised is said, and which columns are not read.

    Args:
        rows: All of one format.
        format: A name out of `FORMATS`. Default: the one whose columns the first row has.
        columns: What the format's columns are called in the rows, where they are called otherwise:
            `{"prompt": "question", "completion": "answer"}`.
        chat: Make conversations of Alpaca rows (for a tokenizer with a chat template) instead of
            setting them in Alpaca's own layout.
        prompts_only: For prediction: the columns of answers need not be there and are not read
            (completions are empty), and a chat ends where it is the assistant's turn to speak.

    Raises:
        ConfigError: If `format` or `columns` name what there is not.
        RecordError: If no format or several fit the first row, or a row does not fit its format.
    """
    columns = columns or {}
    check_format(format, columns)
    for row in rows:
        if format is None:
            format = recognised_format(row, columns, prompts_only)
            announce_format(row, format, columns)
        yield FORMATS[format].read(Fields(row, format, columns, chat, prompts_only))


def check_format(format: str | None, columns: Mapping[str, str]) -> None:
    """Refuse a format that is unknown, and columns that it does not have."""
    if format is not None and format not in FORMATS:
        hint = nearest_hint(format, FORMATS)
        raise ConfigError(f"unknown format {format!r}.{hint} Formats: {_listed()}. (data.format)")
    known = [FORMATS[format]] if format else list(FORMATS.values())
    if columns and not any(each.knows(columns) for each in known):
        fields = sorted({name for each in known for name in (*each.required, *each.optional)})
        wrong = next((name for name in columns if name not in fields), None)
        hint = nearest_hint(wrong, fields) if wrong else ""
        raise ConfigError(
            f"columns names {first_few(columns)}, but "
            + (f"the format {format!r} has no {wrong!r}" if format else "no format has all of them")
            + f".{hint} Formats: {_listed()}. Map the format's names to the file's. (data.columns)"
        )


def recognised_format(row: Row, columns: Mapping[str, str], prompts_only: bool = False) -> str:
    """The one format whose columns `row` has."""
    fitting = [
        name
        for name, form in FORMATS.items()
        if form.knows(columns)
        and all(columns.get(field, field) in row.values for field in form.needed(prompts_only))
    ]
    if len(fitting) == 1:
        return fitting[0]
    found = first_few(row.values, 20)
    for field, column in columns.items():
        if column not in row.values:
            hint = nearest_hint(column, row.values)
            raise RecordError(
                f"{row.where}: no key {column!r}, which columns names for {field!r}. Keys found: "
                f"{found}.{hint} (data.columns)"
            )
    if fitting:
        raise RecordError(
            f"{row.where}: its keys ({found}) fit several formats: {', '.join(fitting)}. "
            "Name the one that is meant. (data.format)"
        )
    raise RecordError(
        f"{row.where}: its keys ({found}) fit no format. Formats: {_listed()}. Name the columns of "
        'one of them, such as {"prompt": "question", "completion": "answer"}. (data.columns)'
    )


def announce_format(row: Row, format: str, columns: Mapping[str, str]) -> None:
    """Say which format was recognised, and what of `row` is not read."""
    if get_worker_info() is not None:
        return  # the main process has said it
    form = FORMATS[format]
    read = {columns.get(field, field) for field in (*form.required, *form.optional)}
    unread = [column for column in row.values if column not in read]
    rank_zero_info(
        f"{row.where}: the format is {format!r} (data.format)"
        + (f"; keys not read: {first_few(unread, 20)}" if unread else "")
    )


def _listed() -> str:
    return ", ".join(f"{name} ({', '.join(form.required)})" for name, form in FORMATS.items())


@dataclass(frozen=True)
class TextSource:
    """Path of rows, and their format.

    Attributes:
        path: As `read_rows` takes it.
        key: The config key of `path`.
        format, columns, chat, prompts_only: As for `read_samples`.
        streaming: Read a dataset of the hub as rows are asked for.
    """

    path: str
    key: str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    chat: bool = False
    prompts_only: bool = False
    streaming: bool = False

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """The rows, without the first `skip`."""
        return read_rows(self.path, key=self.key, skip=skip, streaming=self.streaming)

    def samples(self, rows: Iterable[Row] | None = None) -> Iterator[Sample]:
        """Read the samples of all rows, or of some."""
        return read_samples(
            self.rows() if rows is None else rows,
            format=self.format,
            columns=self.columns,
            chat=self.chat,
            prompts_only=self.prompts_only,
        )

    def recognised(self) -> TextSource:
        """Return the source with the first row's format, and say which that is."""
        for row in self.rows():
            if self.format is not None:
                return self
            form = recognised_format(row, self.columns or {}, self.prompts_only)
            announce_format(row, form, self.columns or {})
            return replace(self, format=form)
        raise RecordError(f"{self.path}: no rows; it is empty. ({self.key})")
