"""Entry point of the command `lora-lightning`: which verb it is, and errors in one line."""

from __future__ import annotations

import os
import sys

from lora_lightning.cli.run_arguments import with_run
from lora_lightning.errors import LoraError

PROGRAM = "lora-lightning"


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Exit codes: 0 done, 1 error, 2 unknown option, 130 Ctrl-C, 143 SIGTERM (saved before).
    """
    arguments = [*(sys.argv[1:] if args is None else args)]
    sys.path.insert(0, os.getcwd())  # so that `class_path: my_module.MyModel` finds the user's file
    try:
        _run(arguments)
    except (LoraError, ValueError) as error:
        ours: BaseException | None = error
        while ours is not None and not isinstance(ours, LoraError):
            ours = ours.__cause__  # jsonargparse wraps what the constructor of a class raises
        if ours is None:
            raise
        sys.stderr.write(f"{PROGRAM}: {type(ours).__name__}: {ours}\n")
        sys.exit(1)


def _run(arguments: list[str]) -> None:
    # What is imported here takes seconds.
    from lora_lightning.cli.log_filter import filter_logs
    from lora_lightning.cli.verbs import VERBS, run_verb

    filter_logs()
    if arguments and arguments[0] in VERBS:
        run_verb(*arguments)
        return
    from lora_lightning.cli.lora_cli import LoraCLI

    expanded = with_run(arguments)
    if arguments == sys.argv[1:]:  # which processes that a strategy starts are given, too
        sys.argv[1:] = expanded
        LoraCLI()
    else:
        LoraCLI(expanded)
