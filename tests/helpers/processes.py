"""Run a function on several processes that find each other, as torchrun would start them.

    losses = on_processes(2, train, folder, epochs=3)  # [of rank 0, of rank 1]

The function is one of a test file's own, found again by its name; what it returns is stored with
`torch.save`. The first process that fails ends the others: no test waits for a rank that is gone.
"""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.paths import child_environment


def on_processes(count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """What `function(*args, **kwargs)` returns on each of `count` processes, by rank."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        call = (function.__module__, function.__qualname__, args, kwargs)
        Path(folder, "call.pkl").write_bytes(pickle.dumps(call))
        _run(count, folder)
        files = [Path(folder, f"rank{rank}.pt") for rank in range(count)]
        return [torch.load(file, weights_only=False) for file in files]


def _run(count: int, folder: str, limit: float = 300.0) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = child_environment(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",  # by which Lightning knows that the processes are there
    )
    shared.pop("PL_GLOBAL_SEED", None)  # of a test before, which Lightning would seed them with
    logs = [Path(folder, f"log{rank}") for rank in range(count)]
    running = []
    for rank, path in enumerate(logs):
        with path.open("w") as log:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__, folder],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log, stderr=subprocess.STDOUT, cwd=folder,
                )
            )  # fmt: skip
    end = time.monotonic() + limit
    try:
        codes = [process.poll() for process in running]
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.05)
            codes = [process.poll() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(codes) or None in codes:
        texts = [f"--- rank {i}: {codes[i]}\n{path.read_text()}" for i, path in enumerate(logs)]
        raise AssertionError("\n".join(texts))


def _serve(folder: str) -> None:
    import torch

    module, name, args, kwargs = pickle.loads(Path(folder, "call.pkl").read_bytes())
    result = getattr(importlib.import_module(module), name)(*args, **kwargs)
    torch.save(result, Path(folder, f"rank{os.environ['RANK']}.pt"))
    # Not through the interpreter's end: where one rank leaves before the others, torch's threads
    # abort there now and then (SIGABRT, "terminate called without an active exception").
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
