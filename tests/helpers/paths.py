"""Where the repository lies, its packages in order, and what a process needs to find it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The packages from the bottom up: each imports itself and those before it, never one behind it.
PACKAGES = [
    "errors", "utilities", "adapters", "layers", "engine", "checkpoint", "training", "callback",
    "tasks", "data", "callbacks", "runs", "examination", "verbs", "cli",
]  # fmt: skip


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment with `tests` importable, one thread, and `variables`."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
