"""Mistakes in the arguments that are found from the snapshot, before torch is imported.

A parser is made of what the snapshot knows. What it refuses, the command's own parser refuses as
well, in the same words; all else is left to that one.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any, Literal, Union

from lora_lightning.cli.options import Known, Option, Verb, spelled_out
from lora_lightning.cli.terminal import refuse
from lora_lightning.cli.wording import reworded, unknown_of_a_class

_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "null": type(None)}
# What both parsers find alike.
_ALIKE = re.compile(
    r"^unrecognized arguments|takes |does not accept option|^argument --[\w.]+: expected one|"
    r"^the following arguments are required|^model and data missing"
)


class _Refused(Exception):
    """Carries what the light parser says."""


def check_arguments(
    verb: str, arguments: list[str], configs: list[dict[str, Any]], known: Known
) -> None:
    """End with 2 and one message if there is a mistake that the snapshot shows.

    Args:
        verb: One of `known.verbs`.
        arguments: Those behind it.
        configs: What the config files among them say.
        known: The snapshot.

    """
    if any(word.partition("=")[0].endswith((".help", "--print_config")) for word in arguments):
        return
    runs = known.verbs[verb].runs
    own = _own_classes(arguments, configs, known) if runs else {}
    options = known.options_of(verb)
    parser = _light_parser(options, own, runs)
    text: str | None
    try:
        switches = [o.name for o in options if not runs and {*o.kinds} - {"null"} == {"bool"}]
        words = _without_run(arguments, bool(configs), runs)
        parser.parse_args(spelled_out(words, switches))
        text = _missing_sections(verb, arguments, configs) if runs else None
    except _Refused as refused:
        _, is_unknown, unknown = str(refused).partition("nrecognized arguments: ")
        if is_unknown:
            text = _unknown(unknown.split(), arguments, options, own)
        else:
            text = reworded(str(refused), ())
    if text is not None and _ALIKE.search(text):
        refuse(text, verb)


def _missing_sections(verb: str, arguments: list[str], configs: list[dict[str, Any]]) -> str | None:
    """Said of a command without any model and data, in jsonargparse's words."""
    if arguments and not arguments[0].startswith("-"):
        return None  # a run
    given = ("--model", "--data", "--config", "-c")
    if configs or any(word.startswith(given) for word in arguments):
        return None
    return reworded(f"the following arguments are required: {verb}.data, {verb}.model", ())


def _own_classes(
    arguments: list[str], configs: list[dict[str, Any]], known: Known
) -> dict[str, tuple[str, Verb]]:
    """Section -> import path and options of its class, where it is one of ours."""
    found = {}
    for section, classes in (("model", known.models), ("data", known.data)):
        named = [config[section] for config in configs if section in config]
        path = named[-1].get("class_path") if named and isinstance(named[-1], dict) else None
        flags = (f"--{section}", f"--{section}.class_path")
        if any(argument.partition("=")[0] in flags for argument in arguments):
            continue
        if path in classes:
            found[section] = (str(path), classes[str(path)])
    return found


def _without_run(arguments: list[str], configured: bool, runs: bool) -> list[str]:
    """The arguments as the light parser takes them."""
    if runs:
        return arguments[1:] if arguments and not arguments[0].startswith("-") else arguments
    rest = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            next(words, None)
        elif not word.startswith("--config="):
            rest.append(word)
    return ["run", *rest] if configured else rest  # whose place the config takes


def _unknown(
    unknown: list[str],
    arguments: list[str],
    options: tuple[Option, ...],
    own: dict[str, tuple[str, Verb]],
) -> str | None:
    """What to say of arguments that nothing takes; `unknown`: those, parted at spaces."""
    open_ended = {option.name for option in options if not option.kinds}
    kept: list[str] = []
    for argument in unknown:
        if not argument.startswith("--") or argument not in arguments:  # a value
            if kept:
                kept.append(argument)
            continue
        name = argument[2:].partition("=")[0].rstrip("+")
        section, _, key = name.partition(".")
        if section in own and key.isidentifier() and key not in _CLASS_KEYS:
            path, described = own[section]
            return unknown_of_a_class(path, key, section, [o.name for o in described.options])
        parts = name.split(".")
        begins = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if name in _SECTION_FILES or begins & open_ended:
            return None  # of a class, or a file for a section: the command's own parser knows
        kept.append(argument)
    names = [option.name for option in options]
    return reworded(f"unrecognized arguments: {' '.join(kept)}", names) if kept else None


_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs", "help")
_SECTION_FILES = ("lora", "trainer")


def _light_parser(options: tuple[Option, ...], own: dict[str, tuple[str, Verb]], runs: bool) -> Any:
    from jsonargparse import ArgumentParser

    class LightParser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise _Refused(message)

    parser = LightParser(prog="light", allow_abbrev=False, add_help=False)
    if runs:
        parser.add_argument("-c", "--config")
    for option in options:
        if option.name in own:
            continue  # `--model CLASS`, say, is not there, and would take --model.ANYTHING
        _add(parser, option.name, option, runs)
    for section, (_, described) in own.items():
        for option in described.options:
            _add(parser, f"{section}.{option.name}", option, runs)
    return parser


def _add(parser: Any, name: str, option: Option, runs: bool) -> None:
    if not option.positional:
        # `--names+ a` adds to a list.
        required = option.required and not runs  # those may stand in a config
        parser.add_argument(f"--{name}", type=_type(option.kinds), required=required)
    else:
        nargs = "*" if option.several else None if option.required else "?"
        added = parser.add_argument(name, type=Any, nargs=nargs)
        added.required = option.required  # argparse asks for any number, too


def _type(kinds: tuple[str, ...]) -> Any:
    parts: list[Any] = []
    for is_type, group in groupby(kinds, _TYPES.__contains__):
        if is_type:
            parts += [_TYPES[kind] for kind in group]
        else:
            parts.append(Literal[tuple(choice[1:-1] for choice in group)])
    return Union[tuple(parts)] if parts else Any  # noqa: UP007
