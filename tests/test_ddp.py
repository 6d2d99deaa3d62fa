"""Two gloo processes on the CPU: same adapters on both, adapter-only files, exact resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os, sys
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Data, Net, run
from lora_lightning import LoraCallback

folder, epochs, resume, devices, batch = sys.argv[1], *map(int, sys.argv[2:6])
torch.manual_seed(0)
module = Net().eval()
module.body[1].p = 0.0  # dropout draws differ with the batch's shape
torch.rand(1)
callback = LoraCallback(r=2, target_modules=["embed", "body.2"], modules_to_save=["head"])
saver = ModelCheckpoint(folder, save_last=True, filename="{epoch}")
trainer = run(folder, callback, saver, max_epochs=epochs, devices=devices,
              strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=False)
from torch.utils.data import DataLoader
every_other = list(range(int(os.environ.get("LOCAL_RANK", 0)), 64, devices))
loader = DataLoader(Data().dataset, batch_size=batch, sampler=every_other)
trainer.fit(module, loader, ckpt_path="last" if resume else None)
state = {k: v for k, v in module.state_dict().items() if ".adapters." in k}
torch.save(state, f"{folder}/rank{trainer.global_rank}.pt")
"""


def train(
    folder: Path, epochs: int, *, resume: bool = False, devices: int = 2, batch: int = 8
) -> dict:
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(epochs), str(int(resume)), str(devices), str(batch)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    states = [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(devices)]
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in states[0])
    return states[0]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 4)
    train(tmp_path / "broken", 2)
    resumed = train(tmp_path / "broken", 4, resume=True)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    saved = torch.load(tmp_path / "straight/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == straight.keys()
    # One process with the doubled batch: the same samples in another order of summation.
    alone = train(tmp_path / "alone", 4, devices=1, batch=16)
    for key, value in straight.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5)
