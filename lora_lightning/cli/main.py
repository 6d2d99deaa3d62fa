"""Entry point of the command `lora-lightning`: which verb it is, and errors in one line."""

from __future__ import annotations

import os
import sys

from lora_lightning.cli.config_files import config_files, contents
from lora_lightning.cli.run_arguments import with_run
from lora_lightning.cli.terminal import end, refuse, tell
from lora_lightning.cli.wording import PROGRAM
from lora_lightning.errors import LoraError, nearest_hint

_HELP = ("-h", "--help")


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Exit codes: 0 done, 1 error, 2 unknown option, 130 Ctrl-C, 143 SIGTERM (saved before).
    """
    arguments = [*(sys.argv[1:] if args is None else args)]
    sys.path.insert(0, os.getcwd())  # so that `class_path: my_module.MyModel` finds the user's file
    try:
        if not _done_without_torch(arguments):
            _run(arguments)
    except Exception as error:
        ours: BaseException | None = error
        while ours is not None and not isinstance(ours, LoraError):
            ours = ours.__cause__  # jsonargparse wraps what the constructor of a class raises
        if ours is None:
            ours = _known_to_be_ours(error)
        if ours is None:
            raise
        end(f"{PROGRAM}: {type(ours).__name__}: {ours}")


def _known_to_be_ours(error: BaseException) -> LoraError | None:
    """What Lightning says at the end of ten screens, in one line."""
    if "lora_lightning.cli.early_checks" not in sys.modules:
        return None
    from lora_lightning.cli.early_checks import monitor_error

    return monitor_error(error)


def _done_without_torch(arguments: list[str]) -> bool:
    """Help, the list of configs, and mistakes: what the snapshot of all options is enough for."""
    verb, *rest = arguments or ["--help"]
    asks = verb in _HELP or any(word in _HELP for word in rest)
    if verb == "configs" and not asks:
        from lora_lightning.cli.configs import configs

        configs(rest)
        return True
    from lora_lightning.cli.options import snapshot

    known = snapshot()
    if known is None:
        if not asks:
            contents(config_files(arguments))
            return False
        from lora_lightning.cli.snapshot import asked_parsers

        known = asked_parsers()
    verbs = ["configs", *known.verbs]
    if asks and (verb in _HELP or verb in verbs):
        from lora_lightning.cli.help import help_of_command, help_of_verb

        tell(help_of_command(known) if verb in _HELP else help_of_verb(verb, known))
        return True
    _check_verb(verb, rest, verbs)
    found = contents(config_files(arguments))
    if verb in verbs:
        from lora_lightning.cli.quick_check import check_arguments

        check_arguments(verb, rest, found, known)
    return False


def _check_verb(verb: str, rest: list[str], verbs: list[str]) -> None:
    """End with 2 if the first argument is none; options of all verbs may stand before it."""
    if verb in verbs or (verb.startswith("-") and {*verbs} & {*rest}):
        return
    text = f"there is no verb {verb!r}.{nearest_hint(verb, verbs)}"
    if verb.startswith("-"):
        text = "there is no verb; it comes first."
    refuse(text, "")


def _run(arguments: list[str]) -> None:
    # What is imported here takes seconds.
    from lora_lightning.cli.log_filter import filter_logs
    from lora_lightning.cli.verbs import VERBS, run_verb

    filter_logs()
    if arguments[0] in VERBS:
        run_verb(*arguments)
        return
    from lora_lightning.cli.lora_cli import LoraCLI

    expanded = with_run(arguments)
    if arguments == sys.argv[1:]:  # which processes that a strategy starts are given, too
        sys.argv[1:] = expanded
        LoraCLI()
    else:
        LoraCLI(expanded)
