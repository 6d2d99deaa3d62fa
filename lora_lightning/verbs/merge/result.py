"""What a merge did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lora_lightning.verbs.merge.comparison import Difference


@dataclass
class MergeResult:
    """What a merge wrote, and how it compares.

    Attributes:
        out: The folder of a model, or the checkpoint of a module.
        checkpoint: Of which the adapters are.
        adapters: Those that are in it.
        how: How it was done, in a line.
        dtype: Of the weights; None where it is that of each tensor of the base.
        merged: |score difference| to the model with adapters, of the merged one in float32; None
            where it was not compared.
        saved: The same of what was written, its weights as they are there, computed in float32.
        rows: On how many validation rows.
        notes: What else there is to know.
        use: How the result is loaded.

    """

    out: Path
    checkpoint: Path
    adapters: list[str]
    how: str = ""
    dtype: str | None = None
    merged: Difference | None = None
    saved: Difference | None = None
    rows: int = 0
    notes: list[str] = field(default_factory=list)
    use: str = ""

    def lines(self) -> list[str]:
        """All of it, a line each."""
        names = ", ".join(self.adapters)
        lines = [f"merged {names} of {self.checkpoint}: {self.how}"]
        if self.merged is not None and self.saved is not None:
            lines += [
                f"|logit difference| to the model with its adapter, {self.rows} validation rows",
                f"(logits up to {self.merged.scale:.3g}):",
                f"  merged in float32:            {self.merged}",
                f"  as saved ({self.dtype or 'as the base'}): ".ljust(32) + str(self.saved),
            ]
        return [*lines, *self.notes, f"written: {self.out}", f"to use it:\n  {self.use}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())
