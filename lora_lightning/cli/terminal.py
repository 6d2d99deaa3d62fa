"""What the command writes before anything heavy is imported; later, `training/messages.py` does."""

from __future__ import annotations

import sys
from typing import NoReturn

from lora_lightning.cli.wording import complaint
from lora_lightning.errors import printable


def tell(text: str) -> None:
    """Write lines to standard output."""
    sys.stdout.write(printable(text))


def end(text: str) -> NoReturn:
    """Write an error, a line, and exit with 1."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.exit(1)


def refuse(text: str, verb: str) -> NoReturn:
    """Write what is wrong with the arguments of a verb, and exit with 2."""
    sys.stderr.write(complaint(text, verb))
    sys.exit(2)
