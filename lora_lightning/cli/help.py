"""The text of `--help`: of the command, and of each verb."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable

from lora_lightning.cli.options import Known, Option, Verb
from lora_lightning.cli.wording import PROGRAM

CONFIGS = Verb(
    "List the configs that come with the package, or copy one: configs NAME [DEST].",
    (
        Option("name", text="Name of a config; without it, all are listed.", positional=True),
        Option("dest", text="File or folder to copy it to; default: here.", positional=True),
        Option("force", ("bool",), text="Put the copy in the place of a file that is there."),
    ),
)
# What comes before and with training; all other verbs come after it.
_BEFORE = ("configs", "plan", "preview", "examine")
_TRAIN = ("fit", "validate", "test", "predict")
_SECTIONS = {
    "lora": "lora: the adapter",
    "model": "model: what is trained, --model CLASS and its own options as --model.OPTION",
    "data": "data: what it learns from, --data CLASS and its own options as --data.OPTION",
    "trainer": "trainer: Lightning's Trainer; at length: "
    "https://lightning.ai/docs/pytorch/stable/common/trainer.html",
}
_KINDS = {"int": "INT", "float": "NUMBER", "bool": "true|false"}


def help_of_command(known: Known) -> str:
    """Each verb in a line, and how to go on."""
    verbs = {"configs": CONFIGS, **known.verbs}
    after = tuple(name for name in verbs if name not in (*_BEFORE, *_TRAIN))
    lines = [
        f"usage: {PROGRAM} VERB [RUN] [--config NAME ...] [--OPTION VALUE ...]",
        "",
        "LoRA fine-tuning for PyTorch Lightning.",
    ]
    for title, group in (("before", _BEFORE), ("train", _TRAIN), ("after", after)):
        shown = [name for name in group if name in verbs]
        if shown:
            lines += ["", f"{title}:"]
        for name in shown:
            lines += entry(name, sentence(verbs[name].text), 13)
    lines += [
        "",
        "example, without a GPU and without a download of a model from a hub:",
        '  pip install "lora_lightning[quickstart]"',
        f"  {PROGRAM} fit --config quickstart",
        f"  {PROGRAM} validate runs/quickstart",
        "",
        f"All options of a verb: {PROGRAM} VERB --help",
    ]
    return "\n".join(lines) + "\n"


def help_of_verb(name: str, known: Known) -> str:
    """What a verb does, and its options: ours first, and all of them."""
    verb = {"configs": CONFIGS, **known.verbs}[name]
    if verb.runs:
        return _help_of_training(name, verb, known)
    positional = [option for option in verb.options if option.positional]
    words = [PROGRAM, name]
    for part in positional:
        word = f"{part.name.upper()} ..." if part.several else part.name.upper()
        words.append(word if part.required else f"[{word}]")
    lines = [
        f"usage: {' '.join(words)} [--OPTION VALUE ...]",
        "",
        *_text(verb.text),
    ]
    if verb.details:
        for paragraph in verb.details.split("\n\n"):
            lines += ["", *_text(" ".join(paragraph.split()))]
    lines += ["", *(line for option in positional for line in _lines(option))]
    if positional and positional[0].name == "run":
        lines += entry("--config FILE", "In the place of RUN: the run directory of this config.")
    options = (option for option in verb.options if not option.positional)
    lines += [line for option in options for line in _lines(option)]
    return "\n".join(lines) + "\n"


def _help_of_training(name: str, verb: Verb, known: Known) -> str:
    lines = [
        f"usage: {PROGRAM} {name} [RUN] [--config NAME ...] [--OPTION VALUE ...]",
        "",
        *_text(verb.text),
        "",
        *entry("RUN", "Directory of a run, or a checkpoint of it: its config and its checkpoint."),
        *entry(
            "-c, --config FILE",
            f"Options from a YAML file, or a config by its name ({PROGRAM} configs lists them). "
            "One behind another overrides it; options behind override both.",
        ),
        *entry("--print_config", "Show all options as they would be, and end."),
    ]
    options = known.options_of(name)
    for option in options:
        if "." not in option.name and option.name not in _SECTIONS:
            lines += _lines(option)
    for section, title in _SECTIONS.items():
        lines += ["", *_text(title)]
        for option in options:
            if option.name.startswith(f"{section}."):
                lines += _lines(option, shortened=section == "trainer")
        for path, own in {"model": known.models, "data": known.data}.get(section, {}).items():
            lines += _of_class(section, path, own)
    return "\n".join(lines) + "\n"


def _of_class(section: str, path: str, own: Verb) -> list[str]:
    """One of our classes, with the names of its options."""
    names = ", ".join(option.name for option in own.options)
    listed = textwrap.wrap(names, _width() - 6, break_on_hyphens=False)
    return [
        f"  --{section} {path}",
        *textwrap.wrap(
            sentence(own.text), _width() - 4, initial_indent="    ", subsequent_indent="    "
        ),
        *(f"      {line}" for line in listed),
        f"    at length: --{section}.help {path}",
    ]


def _lines(option: Option, shortened: bool = False) -> list[str]:
    text = re.sub(r"\s*Default: [^ ]+?\.(?= |$)", "", option.text)
    if shortened:
        text = sentence(text)
    default = f" (default: {option.default})" if option.default and not option.positional else ""
    if option.positional:
        return entry(option.name.upper(), text)
    kinds = [_KINDS.get(kind, kind.strip("'")) for kind in option.kinds if kind != "null"]
    return entry(f"--{option.name} {'|'.join(dict.fromkeys(kinds)) or 'VALUE'}", text + default)


def entry(head: str, text: str, column: int = 28) -> list[str]:
    """A name, and what it is, beside it if there is room."""
    wrapped = textwrap.wrap(text, _width() - column, break_on_hyphens=False, break_long_words=False)
    if len(head) > column - 4:
        return [f"  {head}", *(" " * column + line for line in wrapped)]
    first, *rest = wrapped or [""]
    return [f"  {head:{column - 2}}{first}".rstrip(), *(" " * column + line for line in rest)]


def _text(text: str) -> Iterable[str]:
    return textwrap.wrap(text, _width())


def sentence(text: str) -> str:
    """The first sentence."""
    found = re.match(r".*?[.?](?= [A-Z]|$)", text)
    return found[0] if found else text


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 100))
