"""What the command knows: its verbs with their options, and the snapshot of it in the package.

To ask the parsers themselves takes seconds, as they import torch. So what they say is kept in
`snapshot.json`, which `python -m lora_lightning.cli.snapshot` writes. It holds for the versions
that it was made with; with others, the parsers are asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).with_name("snapshot.json")
# Whose options the command shows beside its own, and what reads them.
_MADE_WITH = ("lightning", "jsonargparse")


@dataclass(frozen=True)
class Option:
    """One option of a verb, or of a class.

    Attributes:
        name: Without dashes, with its section: `lora.r`.
        kinds: What it takes, if that is plain: of int, float, bool, null, or the choices of a
            Literal, each in quotes. Empty: something else, which only the parser itself can judge.
        default: As text; empty for null.
        text: What it is for.
        positional: Whether it is given without its name.
        required: Whether it has to be given.
        several: Whether it may be given more than once.

    """

    name: str
    kinds: tuple[str, ...] = ()
    default: str = ""
    text: str = ""
    positional: bool = False
    required: bool = False
    several: bool = False


@dataclass(frozen=True)
class Verb:
    """A verb, or a class that may be named in a config.

    Attributes:
        text: What it does or is.
        options: Its own options.
        details: More about it.
        runs: Whether Lightning runs it, so that it takes the options of all those verbs.

    """

    text: str
    options: tuple[Option, ...] = ()
    details: str = ""
    runs: bool = False


@dataclass(frozen=True)
class Known:
    """What the command knows.

    Attributes:
        verbs: By name.
        shared: Options of all verbs that Lightning runs.
        models, data: The package's own classes, by import path.

    """

    verbs: dict[str, Verb]
    shared: tuple[Option, ...] = ()
    models: dict[str, Verb] = field(default_factory=dict)
    data: dict[str, Verb] = field(default_factory=dict)

    def options_of(self, verb: str) -> tuple[Option, ...]:
        """All options of a verb."""
        found = self.verbs[verb]
        return (*found.options, *self.shared) if found.runs else found.options


def spelled_out(arguments: Iterable[str], switches: Iterable[str]) -> list[str]:
    """Write `--force` alone, of a switch named `force`, as `--force=true`."""
    flags, words = {f"--{name}" for name in switches}, [*arguments]
    return [
        f"{word}=true" if word in flags and after not in ("true", "false") else word
        for word, after in zip_longest(words, words[1:], fillvalue="")
    ]


def to_json(known: Known) -> str:
    """The text of the snapshot; what is empty is left out."""

    def short(value: object) -> object:
        if isinstance(value, dict):
            return {key: short(part) for key, part in value.items() if part not in ("", (), False)}
        return [short(part) for part in value] if isinstance(value, (tuple, list)) else value

    content = {"made_with": installed(), **asdict(known)}
    return json.dumps(short(content), indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> Known:
    """What `to_json` wrote."""
    content = json.loads(text)
    return Known(
        _verbs(content["verbs"]),
        _options(content["shared"]),
        _verbs(content["models"]),
        _verbs(content["data"]),
    )


def _verbs(found: dict[str, dict[str, Any]]) -> dict[str, Verb]:
    return {
        name: Verb(**{**verb, "options": _options(verb.get("options", ()))})
        for name, verb in found.items()
    }


def _options(found: Iterable[dict[str, Any]]) -> tuple[Option, ...]:
    return tuple(Option(**{**option, "kinds": tuple(option.get("kinds", ()))}) for option in found)


def installed() -> dict[str, str]:
    """The versions on which the options depend."""
    versions = {}
    for name in _MADE_WITH:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return versions


@cache
def snapshot() -> Known | None:
    """What was kept; None if it was made with other versions."""
    try:
        text = SNAPSHOT.read_text(encoding="utf-8")
    except OSError:
        return None
    return from_json(text) if json.loads(text)["made_with"] == installed() else None
