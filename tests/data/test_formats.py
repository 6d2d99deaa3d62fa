"""Rows become samples: which format they have, what they say, and what is wrong with them."""

from __future__ import annotations

import logging

import pytest
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning.data.samples.formats import read_samples
from lora_lightning.data.samples.sample import Chat, Document, PromptCompletion
from lora_lightning.data.sources.row import Row
from lora_lightning.errors import ConfigError, RecordError
from tests.helpers.messages import message_of

PLACE = "my.jsonl, line 3"
ASKED = {"role": "user", "content": "2+2?"}
ANSWERED = {"role": "assistant", "content": "4"}
SPOKEN = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
SYSTEM = {"role": "system", "content": "Count."}
FORMATS = (
    "Formats: text (text), prompt-completion (prompt, completion), alpaca (instruction, output), "
    "messages (messages), sharegpt (conversations)."
)


def sample(values, **options):
    (only,) = read_samples([Row(values, PLACE)], **options)
    return only


def message(values, error_type=RecordError, **options):
    return message_of(error_type, sample, values, **options)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": "one\n", "id": 7}, Document("one\n", PLACE)),
        ({"prompt": "2+2=", "completion": "4"}, PromptCompletion("2+2=", "4", PLACE)),
        ({"prompt": "", "completion": "4"}, PromptCompletion("", "4", PLACE)),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, Chat((ASKED, ANSWERED), PLACE)),
        ({"messages": [ASKED, ANSWERED]}, Chat((ASKED, ANSWERED), PLACE)),
        ({"messages": [ANSWERED, ASKED]}, Chat((ANSWERED, ASKED), PLACE)),
        (
            {"messages": [SYSTEM, ASKED, ANSWERED], "tools": [{"name": "add"}]},
            Chat((SYSTEM, ASKED, ANSWERED), PLACE, ({"name": "add"},)),
        ),
        ({"messages": [ASKED, ANSWERED], "tools": None}, Chat((ASKED, ANSWERED), PLACE)),
        ({"conversations": SPOKEN}, Chat((ASKED, ANSWERED), PLACE)),
        ({"conversations": [ASKED, ANSWERED]}, Chat((ASKED, ANSWERED), PLACE)),
        (
            {"conversations": SPOKEN, "system": "Count.", "tools": '[{"name": "add"}]'},
            Chat((SYSTEM, ASKED, ANSWERED), PLACE, ({"name": "add"},)),
        ),
        ({"conversations": SPOKEN, "system": ""}, Chat((ASKED, ANSWERED), PLACE)),
    ],
)
def test_the_format_is_recognised(values, expected):
    assert sample(values) == expected


WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Add {them}.

### Response:
"""
WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides \
further context. Write a response that appropriately completes the request.

### Instruction:
Add {them}.

### Input:
2, 2

### Response:
"""


@pytest.mark.parametrize("empty", [{"input": ""}, {"input": None}, {}])
def test_alpaca(empty):
    row = {"instruction": "Add {them}.", "output": "4"}
    assert sample({**row, **empty}) == PromptCompletion(WITHOUT_INPUT, "4", PLACE)
    assert sample({**row, "input": "2, 2"}) == PromptCompletion(WITH_INPUT, "4", PLACE)
    asked = {"role": "user", "content": "Add {them}."}
    assert sample({**row, **empty}, chat=True) == Chat((asked, ANSWERED), PLACE)
    asked = {"role": "user", "content": "Add {them}.\n\n2, 2"}
    assert sample({**row, "input": "2, 2"}, chat=True) == Chat((asked, ANSWERED), PLACE)


def test_columns_of_other_names():
    row = {"question": "2+2=", "answer": "4", "text": "..."}
    columns = {"prompt": "question", "completion": "answer"}
    assert sample(row, columns=columns) == PromptCompletion("2+2=", "4", PLACE)
    assert sample(row, columns=columns, format="prompt-completion") == sample(row, columns=columns)
    row = {"dialog": SPOKEN}
    assert sample(row, columns={"messages": "dialog"}) == Chat((ASKED, ANSWERED), PLACE)


def test_a_named_format_goes_before_what_fits():
    row = {"instruction": "Add.", "output": "4", "text": "all"}
    assert message(row) == (
        f"{PLACE}: its keys (instruction, output, text) fit several formats: text, alpaca. "
        "Name the one that is meant. (data.format)"
    )
    assert sample(row, format="text") == Document("all", PLACE)
    assert sample(row, format="alpaca").completion == "4"


def test_no_format_fits():
    assert message({"question": "2+2=", "answer": "4"}) == (
        f"{PLACE}: its keys (question, answer) fit no format. {FORMATS} Name the columns of one of "
        'them, such as {"prompt": "question", "completion": "answer"}. (data.columns)'
    )
    assert message({"question": "", "answer": ""}, columns={"prompt": "qestion"}) == (
        f"{PLACE}: no key 'qestion', which columns names for 'prompt'. Keys found: question, "
        "answer. Did you mean 'question'? (data.columns)"
    )


def test_formats_and_columns_that_do_not_exist():
    row = {"text": "one"}
    assert message(row, ConfigError, format="sharegtp") == (
        f"unknown format 'sharegtp'. Did you mean 'sharegpt'? {FORMATS} (data.format)"
    )
    assert message(row, ConfigError, columns={"promt": "text"}) == (
        "columns names promt, but no format has all of them. Did you mean 'prompt'? "
        f"{FORMATS} Map the format's names to the file's. (data.columns)"
    )
    assert message(row, ConfigError, format="text", columns={"prompt": "text"}) == (
        "columns names prompt, but the format 'text' has no 'prompt'. "
        f"{FORMATS} Map the format's names to the file's. (data.columns)"
    )
    # refused before the first row is read
    with pytest.raises(ConfigError):
        next(read_samples([], format="sharegtp"))


def test_every_row_must_have_the_format_of_the_first():
    rows = [Row({"prompt": "1", "completion": "2"}, "line 1"), Row({"prompt": "3"}, "line 2")]
    samples = read_samples(rows)
    assert next(samples).completion == "2"
    with pytest.raises(RecordError) as error:
        next(samples)
    assert str(error.value) == (
        "line 2: no key 'completion', which the format 'prompt-completion' needs. Keys found: "
        "prompt. Name the right one. (data.columns)"
    )


def test_an_optional_column_that_is_named_must_be_there():
    row = {"instruction": "Add.", "context": "2, 2", "output": "4"}
    columns = {"input": "context"}
    assert "2, 2" in sample(row, columns=columns).prompt
    assert "Did you mean 'context'?" in message(row, columns={"input": "contxt"})
    assert message(row, format="alpaca", columns={"input": "contxt"}) == (
        f"{PLACE}: no key 'contxt', which the format 'alpaca' needs. Keys found: instruction, "
        "context, output. Did you mean 'context'? Name the right one. (data.columns)"
    )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"text": " \n"}, "'text': is empty. Remove the row or fill it in."),
        ({"text": 5}, "'text': must be a string, found int 5."),
        ({"text": "ab\ud83d"}, "'text': character 3 is '\\ud83d', half of a surrogate pair."),
        ({"prompt": None, "completion": "4"}, "'prompt': must be a string, found null."),
        ({"prompt": "2", "completion": ""}, "'completion': is empty."),
        ({"prompt": [ASKED], "completion": "4"}, "'completion': must be a list of messages"),
        ({"instruction": "", "output": "4"}, "'instruction': is empty."),
        ({"instruction": "Add.", "output": None}, "'output': must be a string, found null"),
        (
            {"instruction": "Add.", "output": "4", "input": 5},
            "'input': must be a string, found int 5.",
        ),
        ({"messages": []}, "'messages': must be a list of messages such as"),
        (
            {"messages": [ASKED, ANSWERED], "tools": {"a": 1}},
            "'tools': must be a list of functions",
        ),
    ],
)
def test_unusable_values(values, problem):
    text = message(values)
    assert text.startswith(f"{PLACE}, key {problem}")


def test_the_files_name_of_a_column_is_in_the_error():
    columns = {"prompt": "question", "completion": "answer"}
    text = message({"question": "2", "answer": 4}, columns=columns)
    assert text == f"{PLACE}, key 'answer': must be a string, found int 4."


def test_turns_that_are_only_read():
    quiet = {**ANSWERED, "weight": 0}
    chat = sample({"messages": [ASKED, quiet, ASKED, {**ANSWERED, "weight": 1}]})
    assert chat == Chat((ASKED, ANSWERED, ASKED, ANSWERED), PLACE, unlearned=(1,))
    chat = sample({"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]})
    assert chat == Chat((ASKED, ANSWERED, ASKED, ANSWERED), PLACE, unlearned=(1,))


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [ASKED]},
        {"messages": [ASKED, {**ANSWERED, "weight": 0}]},
        {"prompt": [ASKED, ANSWERED], "completion": [ASKED]},
        {"conversations": SPOKEN[:1], "system": "Count."},
    ],
)
def test_a_conversation_without_a_turn_to_learn(values):
    assert message(values) == (
        f"{PLACE}: no turn of the assistant to learn. Complete the row or remove it."
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": "Once"}, PromptCompletion("Once", "", PLACE)),
        ({"prompt": "2+2="}, PromptCompletion("2+2=", "", PLACE)),
        ({"prompt": "2+2=", "completion": "4"}, PromptCompletion("2+2=", "", PLACE)),
        ({"prompt": [ASKED]}, Chat((ASKED,), PLACE)),
        ({"instruction": "Add {them}."}, PromptCompletion(WITHOUT_INPUT, "", PLACE)),
        ({"messages": [ASKED]}, Chat((ASKED,), PLACE)),
        ({"messages": [ASKED, ANSWERED, ASKED, ANSWERED]}, Chat((ASKED, ANSWERED, ASKED), PLACE)),
        ({"conversations": SPOKEN, "system": "Count."}, Chat((SYSTEM, ASKED), PLACE)),
    ],
)
def test_prompts_only(values, expected):
    assert sample(values, prompts_only=True) == expected


def test_a_chat_without_a_question():
    assert message({"messages": [ANSWERED]}, prompts_only=True) == (
        f"{PLACE}: no turn that the assistant could answer."
    )
    asked = {"role": "user", "content": "Add."}
    row = {"instruction": "Add."}
    assert sample(row, prompts_only=True, chat=True) == Chat((asked,), PLACE)


def test_a_recognised_format_and_what_is_not_read_are_said_once(caplog):
    rows = [Row({"text": "one", "id": 1, "meta": ""}, f"a, line {n}") for n in (1, 2)]
    with caplog.at_level(logging.INFO):
        list(read_samples(rows))
        list(read_samples([Row({"q": "2", "a": "4"}, PLACE)],
                          columns={"prompt": "q", "completion": "a"}))  # fmt: skip
        list(read_samples(rows, format="text"))
    assert caplog.messages == [
        "a, line 1: the format is 'text' (data.format); keys not read: id, meta",
        f"{PLACE}: the format is 'prompt-completion' (data.format)",
    ]


class Samples(IterableDataset):
    def __iter__(self):
        return (found.text for found in read_samples([Row({"text": "one"}, PLACE)]))


def test_workers_say_nothing(capfd):
    loader = DataLoader(Samples(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert list(loader) == ["one"]
    assert "the format is" not in "".join(capfd.readouterr())
