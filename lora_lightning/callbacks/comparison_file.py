"""The comparison with the base that a fit ended with, kept in its run directory."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from lora_lightning.callbacks.comparison import Comparison
from lora_lightning.errors import CheckpointError
from lora_lightning.utilities.atomic_write import write_atomically

COMPARISON = "comparison.json"


def write_comparison(comparison: Comparison, directory: Path) -> None:
    """Write it as `comparison.json`: all its fields, and its verdict for other readers."""
    content = {**asdict(comparison), "helped": comparison.helped, "verdict": comparison.verdict}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    directory.mkdir(parents=True, exist_ok=True)  # of checkpoints that lie elsewhere
    write_atomically({directory / COMPARISON: text.encode("utf-8", "replace")})


def read_comparison(directory: Path) -> Comparison | None:
    """The comparison in a run directory; None where there is none.

    Raises:
        CheckpointError: If the file is damaged.

    """
    file = directory / COMPARISON
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = {f.name: content[f.name] for f in fields(Comparison) if f.name in content}
        for side in ("base", "tuned"):
            known[side] = {str(name): float(value) for name, value in known[side].items()}
            known[side][known["headline"]]  # there, or damaged
        return Comparison(**known)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(file)!r} is not what a fit writes there ({type(error).__name__}: {error}); "
            "delete it, or run the fit again. (run)"
        ) from error
