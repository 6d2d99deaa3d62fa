"""The options of tasks as their users give them: `lora-lightning fit` on a file of prompts."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import on_processes
from tiny_lm import tiny_llama
from torch import Tensor

import lora_lightning.cli
from lora_lightning.checkpoint_folders import read_checkpoint_folder
from lora_lightning.tasks import network

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # bitsandbytes
    pytest.mark.filterwarnings("ignore:.set_vital. is deprecated"),  # torchdata
]

CONFIG: dict[str, Any] = {
    "lora": {"r": 2, "lora_dropout": 0.2},
    "model": {
        "class_path": "lora_lightning.CausalLM",
        "init_args": {"model": "llama", "learning_rate": 1e-2},
    },
    "data": {
        "class_path": "lora_lightning.TextDataModule",
        "init_args": {"train": "my.jsonl", "val": "my.jsonl", "batch_size": 4},
    },
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}
SHARED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, a file, a config."""
    place = tmp_path_factory.mktemp("user")
    tiny_llama(place / "llama")
    (place / "only_config").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (place / "only_config" / name).write_bytes((place / "llama" / name).read_bytes())
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"{a} {b}", "completion": f" {b} {a}"[: 4 + i]}
        for i, a in enumerate(words)
        for b in words[:2]
    ]
    (place / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "my.yaml").write_text(yaml.safe_dump(CONFIG))
    sharded = {"trainer": {"strategy": SHARED, "devices": 2}}
    (place / "sharded.yaml").write_text(yaml.safe_dump(sharded))
    return place


def fit(folder: Path, monkeypatch: Any, run: str, *arguments: str) -> dict[str, Tensor]:
    """What the run's checkpoint holds."""
    monkeypatch.chdir(folder)
    options = ["fit", "--config", "my.yaml", f"--trainer.default_root_dir=runs/{run}", *arguments]
    monkeypatch.setattr(sys, "argv", ["lora-lightning", *options])
    torch._dynamo.reset()
    lora_lightning.cli.main()
    (path,) = (folder / "runs" / run / "checkpoints").glob("*.ckpt")
    if path.is_dir():
        return read_checkpoint_folder(path)["state_dict"]
    return torch.load(path, weights_only=True)["state_dict"]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return fit(folder, monkeypatch, "plain")


def test_gradient_checkpointing_on_is_off(folder: Path, plain: Any, monkeypatch: Any) -> None:
    assert len(plain) == 28
    assert equal(plain, fit(folder, monkeypatch, "gc", "--model.gradient_checkpointing=true"))


def test_twin_that_draws_other_dropout_in_backward(
    folder: Path, plain: Any, monkeypatch: Any
) -> None:
    original = network._checkpoint_layers

    def careless(model: Any, name: str) -> None:
        original(model, name)
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = functools.partial(
                layer._gradient_checkpointing_func, preserve_rng_state=False
            )

    monkeypatch.setattr(network, "_checkpoint_layers", careless)
    assert not equal(plain, fit(folder, monkeypatch, "twin", "--model.gradient_checkpointing=true"))


def test_qlora(folder: Path, plain: Any, monkeypatch: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    options = ["--model.quantize=nf4", "--trainer.precision=bf16-mixed"]
    found = fit(folder, monkeypatch, "nf4", *options, "--model.lr_schedule=cosine")
    assert found.keys() == plain.keys()
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in found.values())


def test_compile_and_its_options(folder: Path, plain: Any, monkeypatch: Any) -> None:
    # Without dropout, of which a graph draws other numbers.
    options = ["--lora.lora_dropout=0", "--model.warmup_steps=2", "--data.packing=true"]
    options += [
        "--data.max_length=24",
        "--data.batch_size=1",
        "--trainer.limit_val_batches=0",
    ]  # one graph
    options.append("--trainer.accumulate_grad_batches=2")
    wanted = fit(folder, monkeypatch, "not compiled", *options)
    options.append("--model.compile={backend: eager, fullgraph: true}")
    found = fit(folder, monkeypatch, "compiled", *options)
    assert all(torch.allclose(found[key], tensor, atol=1e-6) for key, tensor in wanted.items())


def test_pretraining(folder: Path, monkeypatch: Any) -> None:
    """The whole network from random weights, without adapters."""
    options = ["--lora.enabled=false", "--model.pretrained=false", "--model.model=only_config"]
    found = fit(folder, monkeypatch, "pretrained", *options, "--model.weight_decay=0.1")
    assert len(found) == 21


def fit_here(folder: Path) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = ["--config=sharded.yaml", "--data.batch_size=2"]
        saved = fit(folder, monkeypatch, "sharded", *options)
        return dict(saved)


@pytest.mark.slow
def test_shared_out_by_yaml_alone(folder: Path, plain: Any) -> None:
    for found in on_processes(2, fit_here, folder):
        assert found.keys() == plain.keys()
        assert all(tensor.any() for tensor in found.values())
