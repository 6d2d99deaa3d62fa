"""Messages of a conversation as files write them, made what chat templates read."""

from __future__ import annotations

import json
from typing import Any

from lora_lightning.data.sources.row import check_characters, described
from lora_lightning.errors import RecordError, nearest_hint

Message = dict[str, Any]

# What transformers' chat templates know, and what ShareGPT and similar files call the same.
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}


def read_messages(value: object, place: str) -> tuple[Message, ...]:
    """The messages of one conversation, with `role`, `content` and what else the file gives them.

    `from` and `value` are read as `role` and `content`, and a ShareGPT `function_call` as a tool
    call of the assistant. Content in parts is joined. Arguments of tool calls that are JSON in a
    string become what they say. OpenAI's `weight`, 0 for a turn of the assistant that is not
    learned, stays in the message. A key without value is left out: tables (Parquet, Arrow) give
    every message all keys, and templates ask only whether one is there.

    Args:
        value: A list of messages, or such a list as JSON in a string (as in CSV).
        place: Where it stands, for error messages.
    """
    messages = _parsed(value, place)
    if not isinstance(messages, list) or not messages:
        raise RecordError(
            f"{place}: must be a list of messages such as "
            f'[{{"role": "user", "content": "..."}}], found {described(value)}.'
        )
    return tuple(
        _message(message, f"{place}, message {number}")
        for number, message in enumerate(messages, start=1)
    )


def read_tools(value: object, place: str) -> tuple[Any, ...]:
    """The functions that a conversation may call, as JSON schemas; none where there is no value."""
    tools = _parsed(value, place) if value else []
    if not isinstance(tools, list):
        raise RecordError(f"{place}: must be a list of functions, found {described(value)}.")
    return tuple(tools)


def without_weight(message: Message) -> Message:
    """The message as templates read it: whether it is learned is not for the model."""
    return {key: value for key, value in message.items() if key != "weight"}


def _message(message: object, place: str) -> Message:
    if not isinstance(message, dict):
        raise RecordError(f"{place}: must be an object, found {described(message)}.")
    message = {key: value for key, value in message.items() if value is not None}
    for name, other in (("role", "from"), ("content", "value")):
        if name not in message and other in message:
            message[name] = message.pop(other)
    if message.get("role") == "function_call":
        message = _called(message, place)
    message["role"] = _role(message, place)
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(calls, place)
    message["content"] = _content(message, place)
    if (weight := message.get("weight", 1)) not in (0, 1):
        raise RecordError(
            f"{place}: 'weight' must be 1 (learned) or 0 (only read), found {described(weight)}."
        )
    return message


def _called(message: Message, place: str) -> Message:
    """ShareGPT writes a call as a turn of its own: its content is the JSON of one call or more."""
    calls = _parsed(message.get("content"), place)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RecordError(
            f'{place}: a function_call must say {{"name": ..., "arguments": ...}} in JSON, found '
            f"{described(message.get('content'))}."
        )
    calls = [{"type": "function", "function": call} for call in calls]
    return {**message, "role": "assistant", "content": "", "tool_calls": calls}


def _role(message: Message, place: str) -> str:
    if "role" not in message:
        raise RecordError(f"{place}: has no 'role' (or 'from'). Keys found: {', '.join(message)}.")
    role = message["role"]
    known = {**{name: name for name in ROLES}, **OTHER_NAMES}
    if isinstance(role, str) and role in known:
        return known[role]
    hint = nearest_hint(str(role), known)
    raise RecordError(
        f"{place}: unknown role {role!r}.{hint} Roles: {', '.join([*known, 'function_call'])}."
    )


def _content(message: Message, place: str) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_of_part(part, place) for part in content)
    if content is None and message.get("tool_calls"):
        return ""  # a call without words
    if not isinstance(content, str):
        found = "none" if content is None else described(content)
        raise RecordError(f"{place}: 'content' (or 'value') must be a string, found {found}.")
    check_characters(content, place)
    if not content.strip() and message["role"] == "assistant" and not message.get("tool_calls"):
        raise RecordError(f"{place}: the assistant says nothing. Remove the turn or fill it in.")
    return content


def _text_of_part(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    raise RecordError(
        f"{place}: a part of its content is {repr(kind) if kind else described(part)}, but only "
        "text can be trained on here."
    )


def _tool_calls(value: object, place: str) -> list[Any]:
    calls = _parsed(value, place)
    if not isinstance(calls, list):
        raise RecordError(
            f"{place}: 'tool_calls' must be a list of calls, found {described(value)}."
        )
    return [_tool_call(call, place) for call in calls]


def _tool_call(call: Any, place: str) -> Any:
    """OpenAI's files write arguments as JSON in a string; templates write JSON themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError(
            f'{place}: a tool call must say {{"function": {{"name": ..., "arguments": ...}}}}, '
            f"found {described(call)}."
        )
    if not isinstance(function.get("arguments"), str):
        return call
    arguments = _parsed(function["arguments"], f"{place}, arguments of a tool call")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _parsed(value: object, place: str) -> Any:
    """Parse JSON in a string; return any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{place}: a string here must be JSON, found {described(value)}: broken in column "
            f"{error.colno}: {error.msg}."
        ) from error
