"""The verbs that take a run: public functions of the package, their arguments as options."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

from lora_lightning.cli.options import spelled_out
from lora_lightning.cli.terminal import refuse
from lora_lightning.cli.wording import PROGRAM, reworded
from lora_lightning.runs.objects import object_at
from lora_lightning.runs.run import directory_of_config
from lora_lightning.training.messages import show


@dataclass(frozen=True)
class Verb:
    """How the command calls a function: what has no default is positional, the rest options.

    Attributes:
        second: An argument with a default that stands behind the first, without its name.
        texts: Options that are taken as they are typed, whatever they look like.
        defaults: Of the command, where they are not the function's.
        shown: Print what it returns, which is all that it has to say.

    """

    second: str | None = None
    texts: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    shown: bool = False


# By name; functions that the package has under the same names.
VERBS = {
    "export": Verb(),
    "generate": Verb(texts=("prompt", "system"), defaults={"stream": True}),
    "inspect": Verb(second="other", shown=True),
    "merge": Verb(),
    "report": Verb(),
}
# Arguments that take a Python object: on the command line, an import path.
_OBJECTS = ("module", "data")


class VerbParser(ArgumentParser):
    """A parser whose errors are one line, with the nearest known option."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Say what is wrong, and exit with 2."""
        known = [action.dest for action in self._actions]
        return refuse(reworded(message, known), self.prog.rpartition(" ")[2])


def run_verb(verb: str, *arguments: str) -> None:
    """Call the function of a verb with what the command line says."""
    function = getattr(importlib.import_module("lora_lightning"), verb)
    values = parsed(verb, function, arguments)
    for name in _OBJECTS:
        if values.get(name):
            values[name] = object_at(values[name], name)
    more = [*values.pop(several, ())] if (several := _several(function)) else []
    first = [values.pop(name) for name in _positional(function)] if more else []
    result = function(*first, *more, **values)
    if VERBS[verb].shown:
        show(str(result))


def parsed(verb: str, function: Any, arguments: tuple[str, ...]) -> dict[str, Any]:
    """What the command line says, by the names of the function's arguments."""
    parser = parser_of(verb, function)
    kinds = get_type_hints(function).items()
    switches = [name for name, kind in kinds if kind in (bool, bool | None)]
    options = parser.parse_args(_with_directory(spelled_out(arguments, switches)))
    values: dict[str, Any] = parser.instantiate_classes(options).as_dict()
    return values


def parser_of(verb: str, function: Any) -> VerbParser:
    """The parser of a verb."""
    how, kinds = VERBS[verb], get_type_hints(function)
    lists = [name for name, kind in kinds.items() if list[str] in (kind, *get_args(kind)[:1])]
    own: set[str | int] = {*how.texts, *lists, *([how.second] if how.second else [])}
    parser = VerbParser(prog=f"{PROGRAM} {verb}", allow_abbrev=False)
    parser.add_function_arguments(function, as_positional=True, fail_untyped=False, skip=own)
    texts = {
        line.arg_name: line.description for line in docstring_parser.parse(function.__doc__).params
    }
    for name in how.texts:
        parser.add_argument(f"--{name}", type=str, help=texts[name])
    for name in lists:
        parser.add_argument(f"--{name}", type=str, action="append", help=texts[name])
    if how.second:
        parser.add_argument(how.second, type=str, nargs="?", help=texts[how.second])
    if several := _several(function):
        parser.add_argument(several, type=str, nargs="*", default=[], help=texts[several])
    parser.set_defaults(how.defaults)
    return parser


def _several(function: Any) -> str | None:
    """The name of `*others` among the arguments of a function."""
    parameters = inspect.signature(function).parameters.values()
    return next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)


def _positional(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


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
    return [str(directory_of_config(*map(Path, configs))), *rest] if configs else arguments
