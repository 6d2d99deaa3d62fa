"""Two processes train as one does, on any amount of data, and neither waits for the other."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_lightning import LoraCallback, TextDataModule
from lora_lightning.tasks import CausalLM
from tests.helpers.fsdp1_on_cpu import OnCpu
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.tiny_lm import tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("model"), hidden_size=16, num_hidden_layers=1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """41 examples to train on and 13 to validate, neither of which two processes can halve."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 41), ("val", 13)):
        rows = [
            {"prompt": f"What is {n}? " * (1 + n % 5), "completion": f"{n}."} for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "val")}


SPOT = 13  # in the middle of the second epoch


class Steps(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches: list[int] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batches.append(trainer.fit_loop.batch_idx)
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        if trainer.global_step == SPOT:
            trainer.save_checkpoint(self.folder / "middle.ckpt")


def train(
    folder: Path,
    model: str,
    devices: int,
    strategy: str = "auto",
    checkpoint: Path | None = None,
    **how: Any,
):
    """Batches and losses of each step, the validation's results, and the adapter."""
    seed_everything(1 if checkpoint is None else 2, verbose=False)
    warnings.filterwarnings("error", message=".*sync_dist")  # for the processes of their own
    module, steps = (
        CausalLM(model, learning_rate=1e-2, lr_schedule="constant", warmup_steps=0),
        Steps(folder),
    )
    options = {"max_epochs": 2, "devices": devices, "strategy": strategy_of(strategy)}
    trainer = make_trainer(folder, LoraCallback(r=2), steps, **options)
    trainer.fit(module, TextDataModule(max_length=64, **how), ckpt_path=checkpoint)
    adapter = [p.detach() for p in module.parameters() if p.requires_grad]
    if strategy == "fsdp2":
        adapter = [getattr(p, "full_tensor", lambda p=p: p)() for p in adapter]
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
    return steps.batches, steps.losses, metrics, torch.cat([p.flatten() for p in adapter])


RUNS = {
    "map": {},
    "packed": {"packing": True},
    "packed, FSDP2": {"packing": True, "strategy": "fsdp2"},
    "packed, FSDP1": {"packing": True, "strategy": "fsdp1"},
    "streamed": {"streaming": True},
}
RESUMED = ("map", "streamed")


def strategy_of(name: str) -> Any:
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return OnCpu(auto_wrap_policy={LlamaDecoderLayer}) if name == "fsdp1" else name


def train_all(folder: Path, model: str, **how: Any) -> dict[str, Any]:
    """Every run, one after the other: processes take long to start."""
    found = {}
    for name, options in RUNS.items():
        run_options = {"strategy": "ddp", **how, **options}
        found[name] = train(folder / name, model, 2, **run_options)
        if name in RESUMED:
            run_options["checkpoint"] = folder / name / "middle.ckpt"
            found[f"{name}, resumed"] = train(folder / name / "again", model, 2, **run_options)
    return found


@pytest.fixture(scope="module")
def two(model, files, tmp_path_factory):
    return on_processes(2, train_all, tmp_path_factory.mktemp("two"), model, batch_size=2, **files)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "streamed"])
def test_two_processes_train_as_one_does(name, two, model, files, tmp_path):
    batches, losses, metrics, adapter = train(
        tmp_path, model, 1, batch_size=4, **files, packing="packed" in name
    )
    assert len(losses) == 2 * (4 if "packed" in name else 11)
    for theirs in (ran[name] for ran in two):
        assert theirs[0] == batches
        assert theirs[1] == pytest.approx(losses, rel=1e-5)
        assert theirs[2] == pytest.approx(metrics, rel=1e-5)
        assert float((theirs[3] - adapter).norm() / adapter.norm()) < 1e-5


def test_the_comparison_can_fail(model, files, tmp_path):
    """As if the two had read what one reads."""
    *_, adapter = train(tmp_path, model, 1, batch_size=4, **files)
    *_, other = train(tmp_path, model, 1, batch_size=2, **files)
    assert float((other - adapter).norm() / adapter.norm()) > 1e-2


def test_a_stream_ends_on_all_processes_at_once(two, model, files):
    first, second = (ran["streamed"] for ran in two)
    assert first[0] == second[0] == [*range(10), *range(10)]
    assert first[1] == second[1]
    assert torch.equal(first[3], second[3])
    # It would not by itself: 21 examples are 11 batches, and 20 are 10.
    data = TextDataModule(tokenizer=model, max_length=64, batch_size=2, streaming=True, **files)
    lengths = []
    for rank in range(2):
        loader = data.train_dataloader()
        loader.dataset.rank, loader.dataset.processes = rank, 2
        lengths.append(len(list(loader)))
    assert lengths == [11, 10]


@pytest.mark.parametrize("name", RESUMED)
def test_each_process_goes_on_where_it_was(name, two):
    for ran in two:
        straight, resumed = ran[name], ran[f"{name}, resumed"]
        assert resumed[0] == straight[0][SPOT:]
        assert resumed[1] == straight[1][SPOT:]
        assert torch.equal(resumed[3], straight[3])
