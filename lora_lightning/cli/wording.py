"""Words for what jsonargparse says of options: one line, with the nearest known name.

Imports nothing heavy: what is found out without torch is said in the same words.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path

from lora_lightning.cli.loggers import missing_package
from lora_lightning.errors import did_you_mean, nearest_file, nearest_hint, printable

PROGRAM = "lora-lightning"

_KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "null",
    "str": "a text",
    "dict": "a mapping {name: value}",
    "list": "a list",
}
# jsonargparse, of a value of one type, and of several.
_EXPECTED = re.compile(r"Expected a (.+?)\. Got value: (.*?)(?:\n|$)", re.DOTALL)
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\n\s*Subtypes: [^\n]*\n\s*Errors:\n"
    r"(.*)\n\s*Given value type: [^\n]*\n\s*Given value: (.*)",
    re.DOTALL,
)
_KEY = re.compile(r'(?:^|\n)\s*Parser key "([\w.]+)":\s*')
_GIVEN_CLASS = re.compile(r"(?:- |: )Problem with given class_path '([\w.]+)':\s*(.*)", re.DOTALL)


def complaint(text: str, verb: str) -> str:
    """What the command writes of a mistake in the arguments, before it exits with 2."""
    text = printable(text)
    inner = re.match(r"([\w.]+) does not accept option '\w+' \((model|data)\)", text)
    listed = f"--{inner.group(2)}.help {inner.group(1)}" if inner else "--help"
    if not verb or text.startswith("there is no verb"):
        return f"{PROGRAM}: error: {text}\nAll verbs: {PROGRAM} --help\n"
    return f"{PROGRAM}: error: {text}\nAll options: {PROGRAM} {verb} {listed}\n"


def reworded(message: str, known: Iterable[str]) -> str:
    """`message`, shortened to what matters and followed by the nearest known key."""
    message = message.strip()
    ways = (
        _sections, _verb, _adapter_config, _class_that_is_not_there, _module_that_is_not_there,
        _value,
    )  # fmt: skip
    for way in ways:
        if text := way(message):
            return text
    return _unknown_option(message, known) or _of_a_class(message) or message


def _sections(message: str) -> str | None:
    """Of a command without model or data."""
    if not re.match(r"the following arguments are required: (\w+\.(model|data)(, )?)+$", message):
        return None
    names = sorted({name for name in ("model", "data") if f".{name}" in message}, reverse=True)
    return (
        f"{' and '.join(names)} missing: name a config (--config sft, say; `{PROGRAM} configs` "
        f"lists them), or {' and '.join(f'--{name} CLASS' for name in names)}. ({', '.join(names)})"
    )


def _verb(message: str) -> str | None:
    found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if not found:
        return None
    asked, choices = found.groups()
    return f"there is no verb {asked!r}.{nearest_hint(asked, re.findall(r'[a-z]+', choices))}"


def _adapter_config(message: str) -> str | None:
    """An adapter config that there is none of, buried in a list of all that an option can be."""
    found = re.search(
        r"Parser key \"lora\.config\".*?(?:Expected a dot import path string: |"
        r"module 'lora_lightning' has no attribute ')(\w+)",
        message,
        re.DOTALL,
    )
    if not found:
        return None
    from lora_lightning.adapters.registry import config_types

    types = [config_type.__name__ for config_type in config_types().values()]
    hint = nearest_hint(found.group(1), types)
    return (
        f"lora.config: there is no adapter config {found.group(1)!r}.{hint} Known are "
        f"{', '.join(types)}, and the import path of one of your own. (lora.config)"
    )


def _class_that_is_not_there(message: str) -> str | None:
    found = re.search(
        r"Parser key \"([\w.]+)\".*?(?:Expected a dot import path string: |"
        r"module '([\w.]+)' has no attribute ')(\w+)",
        message,
        re.DOTALL,
    )
    if not found:
        return None
    key, module, name = found.groups()
    home = module or "lora_lightning"
    here = importlib.import_module(home)
    near = did_you_mean(name, dir(here))
    if near:
        hint = f" Did you mean '{home}.{near}'?"
    elif module:
        own = [kind for kind, value in vars(here).items() if _is_defined_in(here, value)]
        hint = f" {getattr(here, '__file__', module)} defines {', '.join(own) or 'no class'}."
    else:
        hint = " Name it by its import path."
    asked = f"{module}.{name}" if module else name
    return f"{key}: there is no class {asked!r}.{hint} ({key}.class_path)"


def _is_defined_in(module: object, value: object) -> bool:
    return isinstance(value, type) and value.__module__ == getattr(module, "__name__", None)


def _module_that_is_not_there(message: str) -> str | None:
    """A class of a file that is not found, or that imports what is not there."""
    found = re.search(
        r"Parser key \"([\w.]+)\".*?given class_path '([\w.]+)':\s+No module named '([\w.]+)'",
        message,
        re.DOTALL,
    )
    if not found:
        return None
    key, asked, missing = found.groups()
    if not f"{asked}.".startswith(f"{missing}."):
        return f"{key}: {asked} imports {missing!r}, which is not installed. ({key}.class_path)"
    file = Path.cwd().joinpath(*missing.split(".")).with_suffix(".py")
    return (
        f"{key}: there is no module {missing!r} for {asked!r}: it is not installed, and there is "
        f"no {file.name} in {str(file.parent)!r}, where the command runs.{nearest_file(file)} "
        f"({key}.class_path)"
    )


def _value(message: str) -> str | None:
    """A value of the wrong type: of an option, or of an argument of the class of a section."""
    keys = _KEY.findall(message)
    if not keys:
        return None
    inner = re.search(
        r"given class_path '\S+':\s+Parser key \"[\w.]+\":\s*\n(.*?)\n    - ", message, re.DOTALL
    )
    if inner:
        return _wrong_value(".".join(keys[:2]), inner.group(1).strip())
    return _wrong_value(keys[0], _KEY.sub("", message, count=1))


def _wrong_value(key: str, reason: str) -> str | None:
    if union := _UNION.match(reason):
        errors, given = union.groups()
        if not _GIVEN_CLASS.search(errors):
            return _takes(key, re.findall(r"- Expected a (.+)", errors), given)
    elif single := _EXPECTED.match(reason):
        return _takes(key, [single.group(1)], single.group(2))
    return None


def _takes(key: str, kinds: list[str], given: str) -> str:
    words, hint = [], ""
    for kind in kinds:
        choices = re.findall(r"'([^']*)'", kind) if "Literal" in kind else []
        if choices:
            words.append(f"one of {', '.join(choices)}")
            hint = hint or nearest_hint(given, choices)
        else:
            plain = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>|(?:\w+\.)+(\w+)", r"\1\2", kind)
            words.append(_KINDS.get(plain, plain))
    return f"{key} takes {' or '.join(words)}, not {given.strip()!r}.{hint} ({key})"


def _unknown_option(message: str, known: Iterable[str]) -> str | None:
    inner = re.search(r"given class_path '(\S+)':\s+Option '(\w+)' is not accepted", message)
    if inner:  # buried in a list of everything else that the value could have been
        section = {"lora_lightning.LoraCallback": "lora."}.get(inner.group(1), "")
        where = re.match(r"Parser key \"([\w.]+)\"", message)
        known = {*known, *_options_of(inner.group(1))}
        return unknown_of_a_class(
            inner.group(1), section + inner.group(2), where.group(1) if where else "", known
        )
    unknown = re.search(r"not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)", message)
    if unknown is None:
        return None
    near = did_you_mean(unknown.group(1) or unknown.group(2), known)
    return message.rstrip(".") + "." + (f" Did you mean {near!r}?" if near else "")


def unknown_of_a_class(class_path: str, key: str, section: str, known: Iterable[str]) -> str:
    """Of an option that the class of a section does not have."""
    near = (did_you_mean(key, known) or "").rpartition(".")[2]
    hint = f" Did you mean {near!r}?" if near else ""
    where = f" ({section})" if section else ""
    option = key.rpartition(".")[2]
    return f"{class_path} does not accept option {option!r}{where}.{hint}"


def _of_a_class(message: str) -> str | None:
    """What else is wrong with a class that was named, without the list of all others."""
    keys = _KEY.findall(message)
    found = _GIVEN_CLASS.search(message)
    if not keys or not found:
        return None
    class_path, reason = found.groups()
    reason = re.split(r"\n\s*- |\n\s*Given value", reason)[0]
    reason = " ".join(reason.split())
    if text := missing_package(class_path):
        return f"{keys[0]}: {text} ({keys[0]})"
    arguments = re.match(r"the following arguments are required: (.*)", reason)
    if arguments:
        options = [f"--{keys[0]}.{name} VALUE" for name in arguments.group(1).split(", ")]
        reason = f"it needs {' '.join(options)}."
    return f"{keys[0]}: {class_path}: {reason} ({keys[0]})"


def _options_of(class_path: str) -> set[str]:
    """The arguments of a class, also those that it passes on to the classes it derives from."""
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    inits = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    return {name for init in inits[:-1] for name in inspect.signature(init).parameters} - {"self"}
