"""Where the repository lies, and what a process needs that is to find it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment with `tests` importable, one thread, and `variables`."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
