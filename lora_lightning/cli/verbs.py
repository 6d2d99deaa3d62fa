"""The verbs that take a run: public functions of the package, their arguments as options."""

from __future__ import annotations

import importlib
from typing import Any

from jsonargparse import ArgumentParser

from lora_lightning.cli.terminal import refuse
from lora_lightning.cli.wording import PROGRAM, reworded
from lora_lightning.runs.run import directory_of_config

# By name; a function that the package has under the same name.
VERBS: tuple[str, ...] = ()
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
    parser = parser_of(verb, function)
    options = parser.parse_args(_with_directory([*arguments]))
    values = parser.instantiate_classes(options).as_dict()
    for name in _OBJECTS:
        if values.get(name):
            values[name] = _imported(values[name])
    function(**values)


def parser_of(verb: str, function: Any) -> VerbParser:
    """The parser of a verb: what has no default is a positional argument."""
    parser = VerbParser(prog=f"{PROGRAM} {verb}", allow_abbrev=False)
    parser.add_function_arguments(function, as_positional=True, fail_untyped=False)
    return parser


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
