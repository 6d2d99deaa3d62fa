"""Parser of the command, with words for options that it does not know or cannot take."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from textwrap import dedent
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lora_lightning.adapters.registry import config_types
from lora_lightning.errors import did_you_mean, nearest_hint, printable

PROGRAM = "lora-lightning"


class LoraParser(LightningArgumentParser):
    """Lightning's parser, whose complaint about an unknown key names the nearest known one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An option cut short would be the one that it begins: --lora.rank, say, lora.rank_pattern.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Say what is wrong in one piece, without the usage of all options, and exit with 2."""
        if not self.exit_on_error:
            return super().error(message, ex)
        text = printable(_with_suggestion(message, self._known_keys()))
        inner = re.match(r"([\w.]+) does not accept option '\w+' \((model|data)\)", text)
        listed = f"--{inner.group(2)}.help {inner.group(1)}" if inner else "--help"
        sys.stderr.write(f"{PROGRAM}: error: {text}\nAll options: {PROGRAM} fit {listed}\n")
        return sys.exit(2)

    def _known_keys(self) -> list[str]:
        parsers: list[Any] = [self]
        for action in self._actions:
            if isinstance(action.choices, dict):  # the subcommands' parsers
                parsers += action.choices.values()
        return sorted({action.dest for parser in parsers for action in parser._actions})


def _with_suggestion(message: str, known: list[str]) -> str:
    """`message`, shortened to what matters and followed by the nearest known key."""
    unknown_type = re.search(
        r"Parser key \"lora\.config\".*?(?:Expected a dot import path string: |"
        r"module 'lora_lightning' has no attribute ')(\w+)",
        message,
        re.DOTALL,
    )
    if unknown_type:  # buried in a list of all that an option can be
        types = [config_type.__name__ for config_type in config_types().values()]
        hint = nearest_hint(unknown_type.group(1), types)
        return (
            f"lora.config: there is no adapter config {unknown_type.group(1)!r}.{hint} Known are "
            f"{', '.join(types)}, and the import path of one of your own. (lora.config)"
        )
    unknown_class = re.search(
        r"Parser key \"([\w.]+)\".*?(?:Expected a dot import path string: |"
        r"module '([\w.]+)' has no attribute ')(\w+)",
        message,
        re.DOTALL,
    )
    if unknown_class:
        key, module, name = unknown_class.groups()
        home = module or "lora_lightning"
        near = did_you_mean(name, dir(importlib.import_module(home)))
        hint = f"Did you mean '{home}.{near}'?" if near else "Name it by its import path."
        asked = f"{module}.{name}" if module else name
        return f"{key}: there is no class {asked!r}. {hint} ({key}.class_path)"
    value = re.search(
        r"^Parser key \"([\w.]+)\":\n.*?given class_path '\S+':\s+Parser key \"([\w.]+)\":\n"
        r"(.*?)\n    - ",
        message,
        re.DOTALL,
    )
    if value:  # of the wrong type, buried in a list of all that the section could be
        return f'Parser key "{value.group(1)}.{value.group(2)}":\n{dedent(value.group(3))}'
    inner = re.search(r"given class_path '(\S+)':\s+Option '(\w+)' is not accepted", message)
    if inner:  # buried in a list of everything else that the value could have been
        section = {"lora_lightning.LoraCallback": "lora."}.get(inner.group(1), "")
        key = section + inner.group(2)
        known = [*known, *_options_of(inner.group(1))]
        where = re.match(r"Parser key \"([\w.]+)\"", message)
        message = f"{inner.group(1)} does not accept option {inner.group(2)!r}"
        message += f" ({where.group(1)})." if where else "."
    else:
        unknown = re.search(
            r"not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)", message
        )
        if unknown is None:
            return message
        key = unknown.group(1) or unknown.group(2)
        message = message.rstrip(".") + "."
    near = did_you_mean(key, known)
    if not near:
        return message
    return f"{message} Did you mean {near.rpartition('.')[2] if inner else near!r}?"


def _options_of(class_path: str) -> set[str]:
    """The arguments of a class, also those that it passes on to the classes it derives from."""
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    inits = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    return {name for init in inits[:-1] for name in inspect.signature(init).parameters} - {"self"}
