"""Messages as files write them become messages as chat templates read them."""

from __future__ import annotations

import json

import pytest

from lora_lightning.data.samples.messages import read_messages, read_tools
from lora_lightning.errors import RecordError
from tests.helpers.messages import message_of
from tests.helpers.tiny_lm import CHATML, tiny_tokenizer

PLACE = "my.jsonl, line 3, key 'messages'"
ASKED = {"role": "user", "content": "2+2?"}
ANSWERED = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


def read(*messages):
    return list(read_messages(list(messages), PLACE))


def message(*messages):
    return message_of(RecordError, read, *messages)


def test_messages_pass_unchanged():
    messages = [
        {"role": "system", "content": "Count."},
        {**ASKED, "name": "Ada"},
        {**ANSWERED, "reasoning_content": "2 and 2", "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "x"},
    ]
    assert read(*messages) == messages


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"), ("gpt", "assistant"), ("chatgpt", "assistant"), ("model", "assistant"),
        ("observation", "tool"), ("system", "system"), ("developer", "developer"),
    ],
)  # fmt: skip
def test_other_names_of_roles(name, role):
    assert read({"from": name, "value": "x"}) == [{"role": role, "content": "x"}]


def test_both_spellings_give_the_template_the_same():
    tokenizer = tiny_tokenizer(CHATML)
    spoken = read({"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"})
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False)
        for messages in (spoken, [ASKED, ANSWERED])
    ]
    assert texts[0] == texts[1]
    assert "<|im_start|>user\n2+2?<|im_end|>" in texts[0]


def test_keys_without_value_are_left_out():
    """Arrow gives every message the keys of all; a template asks `'tool_calls' in message`."""
    assert read({**ASKED, "tool_calls": None, "name": None}) == [ASKED]
    assert read({"role": "assistant", "content": None, "tool_calls": [CALL]}) == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]}
    ]


def test_arrow_round_trip():
    datasets = pytest.importorskip("datasets", reason="Arrow tables are made by datasets")
    call = {"name": "add", "arguments": '{"a": 2}'}
    written = [[ASKED, {"role": "assistant", "tool_calls": [{"function": call}]}], [ASKED]]
    table = datasets.Dataset.from_dict({"messages": written})
    assert "tool_calls" in table[1]["messages"][0]
    assert read(*table[1]["messages"]) == [ASKED]
    assert read(*table[0]["messages"])[1]["tool_calls"] == [
        {"function": {"name": "add", "arguments": {"a": 2}}}
    ]


def test_arguments_in_a_string_become_what_they_say():
    function = {"name": "add", "arguments": json.dumps({"a": 2, "b": 2})}
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    assert read(called) == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    broken = {**called, "tool_calls": [{"function": {"name": "add", "arguments": "{a: 2}"}}]}
    assert message(broken) == (
        f"{PLACE}, message 1, arguments of a tool call: a string here must be JSON, found str "
        "'{a: 2}': broken in column 2: Expecting property name enclosed in double quotes."
    )


def test_a_call_as_a_turn_of_its_own():
    expected = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert read({"from": "function_call", "value": json.dumps(CALL["function"])}) == expected
    assert read({"from": "function_call", "value": json.dumps([CALL["function"]])}) == expected
    assert message({"from": "function_call", "value": '{"add": 2}'}) == (
        f'{PLACE}, message 1: a function_call must say {{"name": ..., "arguments": ...}} in JSON, '
        "found str '{\"add\": 2}'."
    )


def test_content_in_parts():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert read({"role": "user", "content": parts}) == [ASKED]
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {}}]
    assert message(ASKED, {"role": "user", "content": parts}) == (
        f"{PLACE}, message 2: a part of its content is 'image_url', but only text can be trained "
        "on here."
    )


def test_json_in_a_string():
    """As it stands in a CSV."""
    assert read_messages(json.dumps([ASKED, ANSWERED]), PLACE) == (ASKED, ANSWERED)
    assert read_tools('[{"name": "add"}]', PLACE) == ({"name": "add"},)
    assert read_tools("", PLACE) == read_tools(None, PLACE) == ()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"role": "usr", "content": "x"},
            "unknown role 'usr'. Did you mean 'user'? Roles: system, ",
        ),
        (
            {"role": 1, "content": "x"},
            "unknown role 1. Roles: system, developer, user, assistant, ",
        ),
        ({"content": "x"}, "has no 'role' (or 'from'). Keys found: content."),
        ({"role": "user"}, "'content' (or 'value') must be a string, found none."),
        ({"role": "user", "content": 5}, "'content' (or 'value') must be a string, found int 5."),
        ({"role": "assistant", "content": " "}, "the assistant says nothing. Remove the turn"),
        (
            {"role": "user", "content": "\udc00"},
            "character 1 is '\\udc00', half of a surrogate pair",
        ),
        ({**ANSWERED, "weight": 0.5}, "'weight' must be 1 (learned) or 0 (only read), found float"),
        ("user: 2+2?", "must be an object, found str 'user: 2+2?'."),
    ],
)
def test_unusable_messages(given, problem):
    assert message(ASKED, given).startswith(f"{PLACE}, message 2: {problem}")


@pytest.mark.parametrize("value", [None, {}, [], 5, '{"role": "user"}'])
def test_no_list_of_messages(value):
    with pytest.raises(RecordError) as error:
        read_messages(value, PLACE)
    assert str(error.value).startswith(f"{PLACE}: must be a list of messages such as ")


def test_text_that_is_no_json():
    with pytest.raises(RecordError) as error:
        read_messages("user: 2+2?", PLACE)
    assert str(error.value) == (
        f"{PLACE}: a string here must be JSON, found str 'user: 2+2?': broken in column 1: "
        "Expecting value."
    )


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        (5, "'tool_calls' must be a list of calls, found int 5."),
        ({"name": "add"}, "'tool_calls' must be a list of calls, found dict {'name': 'add'}."),
        (["add"], "a tool call must say {"),
        ([{"function": "add"}], "a tool call must say {"),
        ([{"function": {"name": 5}}], "a tool call must say {"),
    ],
)
def test_unusable_tool_calls(calls, problem):
    given = {"role": "assistant", "content": "x", "tool_calls": calls}
    assert message(ASKED, given).startswith(f"{PLACE}, message 2: {problem}")


def test_tool_calls_in_other_spellings():
    """As JSON in a string, and without the level `function`: templates read both levels."""
    wrapped = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert read({**wrapped, "tool_calls": json.dumps([CALL])}) == [wrapped]
    flat = {"name": "add", "arguments": '{"a": 2, "b": 2}'}
    assert read({**wrapped, "tool_calls": [flat]}) == [
        {**wrapped, "tool_calls": [CALL["function"]]}
    ]
