"""Two processes, each with random numbers and data of its own, go on exactly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lightning.training.module_hooks
from tests.helpers.fsdp2_modules import ShardedLater, strategy
from tests.helpers.processes import on_processes
from tests.helpers.resumable_run import OwnLuck, ResumableRun, Shared, differences

SPOTS = ("batch2", "batch4", "end4", "batch7")


def run(devices: int, workers: int = 0, **options: Any) -> ResumableRun:
    how = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "max_epochs": 2}
    return ResumableRun(
        OwnLuck, lambda: Shared(workers), options=lambda: {**how, **options}, spots=SPOTS
    )


def go(folder: Path) -> dict[str, list[str]]:
    """What differs between the uninterrupted run and those taken up again, by what was done."""
    both = run(2)
    straight = both.fit(folder)
    found = {
        spot: differences(straight, both.fit(folder, folder / f"{spot}.ckpt")) for spot in SPOTS
    }

    three = run(2, accumulate_grad_batches=3)
    accumulated = three.fit(folder / "three")
    again = three.fit(folder / "again", folder / "three/batch2.ckpt")
    found["accumulate"] = differences(accumulated, again)

    in_workers = run(2, workers=1)
    loaded = in_workers.fit(folder / "workers")
    for spot in ("end4", "batch7"):  # Lightning alone would begin with the order of epoch 0
        again = in_workers.fit(folder / f"workers{spot}", folder / f"workers/{spot}.ckpt")
        found[f"workers {spot}"] = differences(loaded, again)

    state: Any = lora_lightning.training.module_hooks
    found["broken"] = _with_rank_zero_only(state, lambda: differences(
        straight, both.fit(folder / "broken", folder / "batch2.ckpt")
    ))  # fmt: skip
    return found


def _with_rank_zero_only(state: Any, compared: Callable[[], list[str]]) -> list[str]:
    prepare = state.prepare_run_state

    def broken(checkpoint: dict[str, Any], module: Any) -> None:
        entry = checkpoint["lora_lightning"]
        entry["processes"] = [entry["processes"][0]] * 2
        prepare(checkpoint, module)

    state.prepare_run_state = broken
    try:
        return compared()
    finally:
        state.prepare_run_state = prepare


def go_sharded(folder: Path, distributed: bool) -> dict[str, list[str]]:
    """FSDP2, its files sharded or in one piece."""
    options = lambda: {  # noqa: E731
        "devices": 2,
        "strategy": strategy(distributed),
        "max_epochs": 2,
        "accumulate_grad_batches": 3,
    }
    both = ResumableRun(ShardedLater, Shared, options=options, spots=SPOTS)
    straight = both.fit(folder)
    return {
        spot: differences(straight, both.fit(folder / spot, folder / f"{spot}.ckpt"))
        for spot in SPOTS
    }


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False])
def test_two_processes_that_share_the_model(tmp_path: Path, distributed: bool) -> None:
    """Gradients accumulated between two optimizer steps are shards, too."""
    for found in on_processes(2, go_sharded, tmp_path, distributed):
        assert found == {spot: [] for spot in SPOTS}


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    for rank, found in enumerate(on_processes(2, go, tmp_path)):
        broken = found.pop("broken")
        assert any("lora_B" in path for path in broken), rank
        assert found == {what: [] for what in found}, rank
    assert "LOCAL_RANK" not in os.environ

    saved = torch.load(tmp_path / "batch2.ckpt", weights_only=True)["lora_lightning"]
    one, two = (process["random_state"]["torch"] for process in saved["processes"])
    assert not torch.equal(one, two)
    with pytest.warns(UserWarning, match=r"written by 2 processes, and 1 go on: random numbers"):
        run(1).fit(tmp_path / "alone", tmp_path / "end4.ckpt")
