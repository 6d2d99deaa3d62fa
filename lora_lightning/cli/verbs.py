"""The verbs that take a run: public functions of the package, their arguments as options."""

from __future__ import annotations

import importlib
import sys
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser

from lora_lightning.cli.parser import PROGRAM
from lora_lightning.errors import nearest_hint, printable
from lora_lightning.runs.run import directory_of_config
from lora_lightning.training.messages import show

# By name; a function that the package has under the same name.
VERBS: tuple[str, ...] = ("export", "generate", "inspect", "merge")
# What they return is what they have to say.
_SHOWN = ("inspect",)
# Arguments with a default that stand without their name, as a last word.
_LAST = {"inspect": "other"}
# Arguments that take a Python object: on the command line, an import path.
_OBJECTS = ("module", "data")
# Before a word that is a text whatever it looks like: `null`, `[a]`. No argument can hold it.
_TEXT = "\0"


class VerbParser(ArgumentParser):
    """A parser whose errors are one line, with the nearest known option."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Say what is wrong, and exit with 2."""
        unknown = message.partition("nrecognized arguments: ")[2].split(" ")[0].split("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        text = message.strip() + (nearest_hint(unknown, known) if unknown else "")
        sys.stderr.write(f"{PROGRAM}: error: {printable(text)}\nAll options: {self.prog} --help\n")
        return sys.exit(2)


def run_verb(verb: str, *arguments: str) -> None:
    """Call the function of a verb with what the command line says."""
    function = getattr(importlib.import_module("lora_lightning"), verb)
    parser = parser_of(verb, function)
    words = _with_directory(_spelled_out(function, _named(verb, arguments)))
    options = parser.parse_args(words)
    values = parser.instantiate_classes(options).as_dict()
    for name in getattr(function, "command_texts", ()):
        if values[name] is not None:
            values[name] = values[name].removeprefix(_TEXT)
    for name in _OBJECTS:
        if values.get(name):
            values[name] = _imported(values[name])
    result = function(**values)
    if verb in _SHOWN:
        show(str(result))


def parser_of(verb: str, function: Any) -> VerbParser:
    """The parser of a verb: what has no default is a positional argument."""
    parser = VerbParser(prog=f"{PROGRAM} {verb}", allow_abbrev=False)
    parser.add_function_arguments(function, as_positional=True, fail_untyped=False)
    parser.set_defaults(getattr(function, "command_defaults", {}))
    if verb in _LAST:  # its place in the line; the option stays
        parser.usage = f"%(prog)s [options] path [{_LAST[verb]}]"
    return parser


def _named(verb: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Write the last of two words, of a verb that takes one or two, as an option."""
    words = [word for word in arguments if not word.startswith("-")]
    if verb in _LAST and len(words) == len(arguments) == 2:
        return (words[0], f"--{_LAST[verb]}={words[1]}")
    return arguments


def _spelled_out(function: Any, arguments: tuple[str, ...]) -> list[str]:
    """Write out what is typed shorter: a switch alone, and a list's option once for each entry."""
    kinds = get_type_hints(function)
    switches = {f"--{name}" for name, kind in kinds.items() if kind is bool}
    lists = {
        f"--{name}" for name, kind in kinds.items() if list[str] in (kind, *get_args(kind)[:1])
    }
    words = []
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        option = word.partition("=")[0]
        alone = word in switches and after not in ("true", "false")
        words.append(f"{word}=true" if alone else word)
        if option in lists:
            words[-1] = f"{option}+{word.removeprefix(option)}"
    texts = {f"--{name}" for name in getattr(function, "command_texts", ())}
    for place, word in enumerate(words):
        option, given, text = word.partition("=")
        if option in texts and given:
            words[place] = f"{option}={_TEXT}{text}"
        elif place and words[place - 1] in texts and not word.startswith("--"):
            words[place] = f"{_TEXT}{word}"
    return words


def _with_directory(arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the run directory that it names, as the first argument."""
    configs, rest = [], []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            configs.append(next(words, ""))
        elif word.startswith("--config="):
            configs.append(word.partition("=")[2])
        else:
            rest.append(word)
    if not configs:
        return arguments
    from pathlib import Path

    return [str(directory_of_config(*map(Path, configs))), *rest]


def _imported(path: str) -> Any:
    home, _, name = path.rpartition(".")
    return getattr(importlib.import_module(home), name)
