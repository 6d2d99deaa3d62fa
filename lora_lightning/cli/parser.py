"""Parser of the command, with words for options that it does not know or cannot take."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lora_lightning.cli.config_files import with_config_paths
from lora_lightning.cli.terminal import refuse
from lora_lightning.cli.wording import PROGRAM as PROGRAM
from lora_lightning.cli.wording import reworded


class LoraParser(LightningArgumentParser):
    """Lightning's parser, whose complaint about an unknown key names the nearest known one.

    `--config` also takes the name of a config that comes with the package.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An option cut short would be the one that it begins: --lora.rank, say, lora.rank_pattern.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **options: Any
    ) -> Any:
        """Parse, with the path of a config in the place of its name."""
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_args(with_config_paths(words), *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Say what is wrong in one piece, without the usage of all options, and exit with 2."""
        if not self.exit_on_error:
            return super().error(message, ex)
        *before, verb = (self.prog or "").split() or [""]
        verb = verb if before else "fit"  # the whole command's parser has none
        return refuse(reworded(message, self._known_keys()), verb)

    def _known_keys(self) -> list[str]:
        parsers: list[Any] = [self]
        for action in self._actions:
            if isinstance(action.choices, dict):  # the subcommands' parsers
                parsers += action.choices.values()
        return sorted({action.dest for parser in parsers for action in parser._actions})
