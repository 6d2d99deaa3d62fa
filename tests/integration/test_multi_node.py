"""Two machines, played by two agents of torchrun and by a stand-in for SLURM's srun on this one.

The launch files in configs/launch are run as they are.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.paths import ROOT, child_environment
from tests.helpers.tensors import assert_same_state, same_state

LAUNCH = ROOT / "configs/launch"
ON_TWO = {"PROCESSES": "1", "NODES": "2", "ADDRESS": "127.0.0.1"}

MODEL = """
import os, signal, time
import torch
from tests.helpers.lightning_modules import Net

if os.environ.get("RANK") == "1":
    time.sleep(1)  # what rank 0 wrote meanwhile, rank 1 would take for an earlier run


class Noted(Net):
    def __init__(self, time_limit: bool = False) -> None:
        super().__init__()
        self.body[1].p = 0.0
        self.time_is_up = time_limit and os.environ["SLURM_RESTART_COUNT"] == "0"

    def on_train_batch_end(self, *_) -> None:
        if self.time_is_up and self.global_step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.time_is_up and self.global_step == 4:
            os._exit(1)  # SLURM has put the job back and ends it

    def on_train_end(self) -> None:
        state = {k: v for k, v in self.state_dict().items() if ".adapters." in k}
        torch.save(state, f"{self.trainer.default_root_dir}/rank{self.global_rank}.pt")
"""
CONFIG = """
seed_everything: 0
lora: {r: 2, target_modules: [embed, body.2], modules_to_save: [head]}
model: {class_path: two_nodes.Noted}
data: {class_path: tests.helpers.lightning_modules.Data, init_args: {batch_size: 16}}
trainer:
  accelerator: cpu
  max_epochs: 3
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_last: true, filename: best}
"""
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
for task in 0 1; do
  SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 "$@" &
done
wait
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> said
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "two_nodes.py").write_text(MODEL)
    (folder / "my.yaml").write_text(CONFIG)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def start(place: Path, file: str, run: str, *args: str, **variables: str) -> subprocess.Popen:
    installed = Path(sys.executable).parent
    return subprocess.Popen(
        [str(LAUNCH / file), "--config", "my.yaml", "--trainer.default_root_dir", run, *args],
        cwd=place,
        env=child_environment(
            PATH=os.pathsep.join([str(place), str(installed), os.environ["PATH"]]), **variables
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(place: Path, run: str, *args: str, **variables: str) -> tuple[list[int], list[str]]:
    """Exit codes and output of the agents of both machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{probe.getsockname()[1]}"
    agents = [
        start(place, "torchrun.sh", run, *args, HEAD=head, **ON_TWO, **variables) for _ in "01"
    ]
    try:
        said = [agent.communicate(timeout=100)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # an agent ends its workers then, if it still has any
            agent.wait()
    return [agent.returncode for agent in agents], said


def slurm(place: Path, run: str, *args: str, restarts: int = 0) -> str:
    job = {"JOB_ID": "77", "JOB_NAME": "lora", "NNODES": "2", "NTASKS": "2", "NTASKS_PER_NODE": "1"}
    job |= {"NODELIST": "127.0.0.1", "RESTART_COUNT": str(restarts)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {f"SLURM_{name}": value for name, value in job.items()}
    return start(place, "slurm.sbatch", run, *args, **variables, MASTER_PORT=port).communicate(
        timeout=100
    )[0]


def adapters(place: Path, run: str) -> dict[str, torch.Tensor]:
    """The adapters at the end, the same on both machines and in the checkpoint, and nothing else."""
    first, second = (torch.load(place / run / f"rank{i}.pt", weights_only=True) for i in (0, 1))
    saved = torch.load(place / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert_same_state(first, second)
    assert_same_state(first, saved)
    return first


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> dict[str, torch.Tensor]:
    codes, said = torchrun(place, "runs/straight")
    assert codes == [0, 0], said
    assert "16 x 1 accumulated x 2 devices" in "".join(said)
    assert "start it again as before, with --ckpt_path last" in "".join(said)
    return adapters(place, "runs/straight")


@pytest.mark.slow
def test_torchrun_resumes(place: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    codes, said = torchrun(place, "runs/broken", "--trainer.max_epochs", "2")
    assert codes == [0, 0], said
    assert not same_state(adapters(place, "runs/broken"), uninterrupted)
    codes, said = torchrun(place, "runs/broken", "--ckpt_path", "last")
    assert codes == [0, 0], said
    assert_same_state(adapters(place, "runs/broken"), uninterrupted)


@pytest.mark.slow
def test_both_machines_see_an_earlier_run(
    place: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    codes, said = torchrun(place, "runs/straight")
    assert codes == [1, 1]
    assert all("nothing is overwritten. Continue that run with --ckpt_path last" in s for s in said)


@pytest.mark.slow
def test_slurm_requeues(place: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    slurm(place, "runs/slurm", "--model.time_limit", "true")
    assert (place / "said").read_text() == "scontrol requeue 77\n"
    assert (place / "runs/slurm/hpc_ckpt_1.ckpt").is_file()
    said = slurm(place, "runs/slurm", "--model.time_limit", "true", restarts=1)
    assert "hpc_ckpt_1.ckpt" in said
    assert_same_state(adapters(place, "runs/slurm"), uninterrupted)


@pytest.mark.parametrize("file", ["torchrun.sh", "slurm.sbatch"])
def test_launch_files_are_bash(file: str) -> None:
    def check(text: str) -> int:
        return subprocess.run(
            ["bash", "-n"], input=text, text=True, stderr=subprocess.DEVNULL
        ).returncode

    text = (LAUNCH / file).read_text()
    assert check(text) == 0
    assert check(f"{text}\nif true") != 0
