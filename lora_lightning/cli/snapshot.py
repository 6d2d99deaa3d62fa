"""The options of all verbs, asked of the parsers: `python -m lora_lightning.cli.snapshot`."""

from __future__ import annotations

import inspect
import re
import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

import lora_lightning
from lora_lightning.cli.lora_cli import LoraCLI
from lora_lightning.cli.options import SNAPSHOT, Known, Option, Verb, to_json
from lora_lightning.cli.planning import PlanningTrainer
from lora_lightning.cli.terminal import tell
from lora_lightning.cli.verbs import VERBS, parser_of
from lora_lightning.utilities.atomic_write import write_atomically

# Lightning says much of these.
_VERBS = {
    "fit": "Train a module with adapters; goes on with a run if its directory is given.",
    "validate": "Measure a run's checkpoint on the validation data.",
    "test": "Measure a run's checkpoint on the test data.",
    "predict": "Write the predictions of a run's checkpoint into files.",
}
# What is said of these elsewhere is long, or about Python.
_TEXTS = {
    "seed_everything": "Where all randomness begins; true: anywhere.",
    "ckpt_path": "The checkpoint to go on from, or to measure: a file, or `last` or `best` of the "
    "run directory.",
    "weights_only": "false: load a checkpoint that holds Python objects, which can run code.",
    "optimizer": "An optimizer by its class, options as --optimizer.OPTION; default: that of the "
    "module, else AdamW.",
    "lr_scheduler": "A schedule by its class, options as --lr_scheduler.OPTION.",
    "return_predictions": "false: keep no predictions, where a callback writes them.",
    "trainer.default_root_dir": "The run directory: checkpoints, logs, config.",
    "trainer.logger": "A logger by its class, or a list; false: none. Default: CSV files.",
    "trainer.callbacks": "Callbacks by their classes.",
    "trainer.precision": "32-true, 16-mixed, bf16-mixed, 16-true, bf16-true, 64-true, ...",
}
_PLAIN = {int: "int", float: "float", bool: "bool", type(None): "null"}


@cache
def asked_parsers() -> Known:
    """What the parsers know, in the order in which help shows it."""
    asked = {name: _options(parser) for name, parser in _lightning_parsers().items()}
    shared = tuple(
        option for option in asked["fit"] if all(option in options for options in asked.values())
    )
    verbs = {}
    for name, options in asked.items():
        text = _VERBS.get(name) or _summary(getattr(PlanningTrainer, name).__doc__)
        own = tuple(option for option in options if option not in shared)
        verbs[name] = Verb(text, own, runs=True)
    for name in VERBS:
        function = getattr(lora_lightning, name)
        place = [*inspect.signature(function).parameters].index
        of_verb = sorted(_options(parser_of(name, function)), key=lambda o: place(o.name))
        verbs[name] = Verb(_summary(function.__doc__), tuple(of_verb), _details(function))
    return Known(verbs, shared, _classes(LightningModule), _classes(LightningDataModule))


class _Stopped(Exception):
    pass


class _Parsers(LoraCLI):
    """The command up to where it would parse its arguments."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.found = parser
        raise _Stopped(parser)


def _lightning_parsers() -> dict[str, Any]:
    try:
        _Parsers([])
    except _Stopped as stopped:
        actions = stopped.args[0]._actions
    return next(dict(action.choices) for action in actions if isinstance(action.choices, dict))


def _classes(base: type) -> dict[str, Verb]:
    """The package's own classes of one kind, and the options of each."""
    found = {}
    for name in lora_lightning.__all__:
        kind = getattr(lora_lightning, name)
        if inspect.isclass(kind) and issubclass(kind, base):
            parser = ArgumentParser()
            parser.add_class_arguments(kind, fail_untyped=False)
            options = (
                Option(option.name, option.kinds, option.default)  # said by --model.help
                for option in _options(parser)
            )
            found[f"lora_lightning.{name}"] = Verb(_summary(kind.__doc__), tuple(options))
    return found


def _options(parser: Any) -> tuple[Option, ...]:
    return tuple(
        _option(action)
        for action in parser._actions
        if hasattr(action, "_typehint") or action.type is str
        if not action.dest.endswith(".help")
    )


def _option(action: Any) -> Option:
    default = "" if action.default is None else _as_text(action.default)
    return Option(
        action.dest,
        _kinds(getattr(action, "_typehint", str)),
        "" if default == "==SUPPRESS==" else default,
        _TEXTS.get(action.dest) or _plain_text(action.help or ""),
        not action.option_strings,
        action.required,
        action.nargs == "*" or type(action).__name__ == "_AppendAction",
    )


def _plain_text(text: str) -> str:
    """Without the marks of reStructuredText."""
    return " ".join(re.sub(r":\w+:`([^`]*)`|``", r"\1", text).split())


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kinds(hint: Any) -> tuple[str, ...]:
    """The plain kinds of a type; empty if any part of it is something else."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_kinds(part) for part in get_args(hint)]
        return tuple(kind for part in parts for kind in part) if all(parts) else ()
    if get_origin(hint) is Literal:
        plain = all(isinstance(choice, str) for choice in get_args(hint))
        return tuple(repr(choice) for choice in get_args(hint)) if plain else ()
    return (_PLAIN[hint],) if hint in _PLAIN else ()


def _summary(docstring: str | None) -> str:
    """The first paragraph."""
    return " ".join((docstring or "").strip().split("\n\n")[0].split())


def _details(function: Any) -> str:
    """What stands between the first paragraph and the arguments."""
    text = inspect.getdoc(function) or ""
    body = re.split(r"\n(?:Args|Returns|Raises|Examples?):\n", text)[0]
    return body.partition("\n\n")[2].strip()


def main() -> None:
    """Write the snapshot anew."""
    write_atomically({SNAPSHOT: to_json(asked_parsers()).encode()})
    tell(f"{SNAPSHOT}\n")


if __name__ == "__main__":
    main()
