"""Resume from the middle of an epoch: the rest of the run is that of the uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from resuming import Run, differences

import lora_lightning.training.resumable_loader
import lora_lightning.training.run_state


@pytest.mark.parametrize("step", [1, 3, 6])
def test_from_the_middle_of_an_epoch(tmp_path: Path, step: int) -> None:
    run = Run()
    straight = run.fit(tmp_path)
    resumed = run.fit(tmp_path / "again", tmp_path / f"step={step}.ckpt")
    assert len(resumed["losses"]) == 12 - step
    assert differences(straight, resumed) == []


@pytest.mark.parametrize("without", ["random state", "position"])
def test_twin_without_differs(tmp_path: Path, monkeypatch: Any, without: str) -> None:
    run = Run()
    straight = run.fit(tmp_path)
    if without == "random state":
        monkeypatch.setattr(lora_lightning.training.run_state, "set_random_state", lambda _: None)
    else:
        monkeypatch.setattr(
            lora_lightning.training.resumable_loader.ResumableLoader,
            "load_state_dict",
            lambda self, state: None,
        )
    resumed = run.fit(tmp_path / "again", tmp_path / "step=6.ckpt")
    assert any("lora_A" in path for path in differences(straight, resumed))
