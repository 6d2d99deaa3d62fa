"""What an examination found: a row for each promise, and a table of them."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from lora_lightning.errors import ConfigError, nearest_hint
from lora_lightning.training.messages import show


@dataclass(frozen=True)
class Finding:
    """One promise.

    Attributes:
        name: What is promised.
        holds: True or False; None where it could not be examined.
        reason: What was compared, or what does not hold, or why it could not be examined.

    """

    name: str
    holds: bool | None
    reason: str


@dataclass(frozen=True)
class Examination:
    """All promises, in order; `examination["base untouched"]` is one of them.

    Attributes:
        rows: What was found.

    """

    rows: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """True where no promise is broken. What could not be examined is not."""
        return all(row.holds is not False for row in self.rows)

    def __getitem__(self, name: str) -> Finding:
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise ConfigError(
            f"an examination has no row {name!r}.{nearest_hint(name, names)} It has "
            f"{', '.join(names)}. (name)"
        )

    def table(self) -> Table:
        """Promise, whether it holds, and why."""
        table = Table(title="examination", title_justify="left")
        table.add_column("promise", no_wrap=True)
        table.add_column("holds")
        table.add_column("", overflow="fold")
        words = {True: "yes", False: "NO", None: "-"}
        for row in self.rows:
            table.add_row(row.name, words[row.holds], row.reason)
        return table

    def show(self) -> None:
        """Print the table."""
        show(self.table())
