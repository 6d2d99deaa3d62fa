"""`plan`: exact where it says so, and near what is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lora_lightning
from lora_lightning import CausalLM, ConfigError, LoraCallback, ModelError, Plan, plan
from lora_lightning.engine.injection import inject_adapter
from lora_lightning.verbs.plan import step
from lora_lightning.verbs.plan.live_bytes import LiveBytes
from lora_lightning.verbs.plan.placement import parse_bytes
from tests.helpers.command import run_command
from tests.helpers.memory import base_tensors, optimizer_tensors, storages
from tests.helpers.paths import ROOT
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_lm import tiny_llama
from tests.helpers.trained_runs import language_model_run

SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("plan") / "llama", **SIZES)


@pytest.fixture(scope="module")
def planned(llama: Path) -> Plan:
    return plan(CausalLM(llama), LoraCallback(r=4), batch_size=2, length=32)


# -- exact figures ---------------------------------------------------------------------------------


def bytes_of(tensors: Any) -> int:
    return sum(storages(tensors).values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_bytes_are_those_of_a_real_step(llama: Path, precision: str) -> None:
    found = plan(CausalLM(llama), LoraCallback(r=4), length=16, precision=precision)
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    network = AutoModelForCausalLM.from_pretrained(llama).to(dtype)
    inject_adapter(network, lora_lightning.LoraConfig(r=4))
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.arange(16)[None]
    network(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    buffers = [b for name, b in network.named_buffers() if ".adapters." in name]
    own = {id(t) for t in (*trained, *buffers)}
    base = [t for t in base_tensors(network) if t is not None and id(t) not in own]
    assert found.base_bytes == bytes_of(base)
    assert found.adapter_bytes == bytes_of([*trained, *buffers]) > bytes_of(trained)
    assert found.gradient_bytes == bytes_of(p.grad for p in trained)
    assert found.optimizer_bytes == bytes_of(optimizer_tensors(optimizer))
    assert found.trainable == sum(p.numel() for p in trained)
    assert found.parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.slow
def test_bytes_are_those_of_a_run_and_its_checkpoint(
    tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    run = language_model_run(tmp_path)
    before = sorted(run.rglob("*"))
    said = run_command(tmp_path, monkeypatch, capfd, "plan", "runs/lm", "--memory", "2GB")
    assert sorted(run.rglob("*")) == before
    assert "fits in 2GB with" in said
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    steps = checkpoint["global_step"]
    assert f"the run: {steps:,} optimizer steps" in said
    state = checkpoint["optimizer_states"][0]["state"].values()
    tensors = [t for entry in state for t in entry.values()]
    adapter = sum(t.numel() * 4 for t in checkpoint["state_dict"].values())
    whole = adapter + sum(t.numel() * 4 for t in tensors)
    found = plan(CausalLM(tmp_path / "base"), LoraCallback(r=4, lora_alpha=8), length=8)
    assert found.adapter_file_bytes == adapter
    assert found.checkpoint_bytes == whole


def test_a_4_bit_base_is_of_the_size_that_the_paper_says(llama: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole = plan(CausalLM(llama), LoraCallback(r=4), length=8, precision="bf16-true")
    found = plan(CausalLM(llama, quantize="nf4"), LoraCallback(r=4), length=8, precision="bf16-true")  # fmt: skip
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (176, 64), (176, 64), (64, 176)]
    packed = 0
    for out, inside in shapes:
        weights, blocks = out * inside, -(-out * inside // 64)
        scales = blocks + 4 * -(-blocks // 256) + 4  # in 8 bits, theirs and the mean in 32
        packed += weights // 2 + scales
    dense = 2 * sum(a * b for a, b in shapes)
    tables = found.base_bytes - whole.base_bytes - SIZES["num_hidden_layers"] * (packed - dense)
    # Each layer has bitsandbytes' tables of 16 values, and of 256 for the scales.
    assert tables == SIZES["num_hidden_layers"] * len(shapes) * (16 + 256) * 4
    assert found.parameters == whole.parameters


class Chain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 20), nn.Linear(20, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        self.log("loss", 0.0)
        return self.second(torch.tanh(self.first(x))).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Rows(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(24, 10)), batch_size=6)


def test_an_own_module_by_hand() -> None:
    found = plan(Chain(), LoraCallback(r=2, target_modules=["first"]), Rows(), max_epochs=3)
    trained = (10 * 2 + 2 * 20) * 4
    assert found.optimizer_bytes == found.gradient_bytes == trained
    assert found.adapter_bytes == trained + 8  # its scale
    assert found.base_bytes == (10 * 20 + 20 + 20 + 1) * 4
    # tanh keeps its output (6, 20), the adapter x, which is the batch, and its hidden state (6, 2);
    # beside these there is the loss.
    forward = (6 * 20 + 6 * 2 + 1) * 4
    assert found.activation_bytes == forward
    assert found.steps == 3 * 4
    assert plan(Chain(), LoraCallback(r=2), Rows(), batch_size=12).activation_bytes > forward


def test_without_data_or_a_step_that_can_be_followed_activations_are_not_known() -> None:
    found = plan(Chain(), LoraCallback(r=2))
    assert found.activation_bytes is None
    assert "activations are not known: no data are given" in str(found)

    class Asking(Chain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * self.trainer.current_epoch

    found = plan(Asking(), LoraCallback(r=2), Rows())
    assert found.gradient_bytes
    assert "activations are not known: RuntimeError" in str(found)


def test_an_optimizer_that_wants_a_trainer_is_taken_for_adamw() -> None:
    class Asking(Chain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.max_epochs)

    found = plan(Asking(), LoraCallback(r=2), Rows())
    assert found.optimizer_bytes == 2 * found.gradient_bytes + 4 * 4  # and a step for each tensor
    assert "planned is AdamW" in str(found)


def test_a_head_that_no_file_has_trains_in_full(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path)
    task = lora_lightning.SequenceClassification(tmp_path, label_names=["a", "b", "c"])
    found = plan(task, LoraCallback(r=2), batch_size=3, length=16)
    hidden = json.loads((tmp_path / "config.json").read_text())["hidden_size"]
    assert f"{3 * (hidden + 1):,}" in str(found)
    assert "classifier" in str(found)
    assert not found.unknown


# -- the trace -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_layers_that_are_alike_are_counted_as_if_all_were_traced(
    tmp_path: Path, monkeypatch: Any
) -> None:
    tiny_llama(tmp_path, **{**SIZES, "num_hidden_layers": 6})
    found = []
    for traced in (step.TRACED, 1000, 3, 2):
        monkeypatch.setattr(step, "TRACED", traced)
        found.append(plan(CausalLM(tmp_path), LoraCallback(r=4), batch_size=2, length=32))
    assert found[0].placements == found[1].placements == found[2].placements
    assert found[0].activation_bytes == found[3].activation_bytes


def test_memory_that_is_freed_does_not_count(llama: Path, planned: Plan, monkeypatch: Any) -> None:
    monkeypatch.setattr(LiveBytes, "_forget", lambda self, key, *_: self._known.pop(key, None))
    kept = plan(CausalLM(llama), LoraCallback(r=4), batch_size=2, length=32)
    assert kept.peak_bytes > 1.5 * planned.peak_bytes


def test_checkpointing_quantisation_and_smaller_batches_are_offered(llama: Path) -> None:
    planned = plan(CausalLM(llama), LoraCallback(r=4), batch_size=2, length=32, memory="1MB")
    said = str(planned)
    assert f"does not fit: needs {planned.peak_bytes / 1e6:.1f} MB of 1MB" in said
    texts = [change.text for change in planned.changes]
    assert texts[0] == "gradient_checkpointing"
    assert {"quantize nf4", "batch_size 1", "FSDP2 x 8 devices"} <= {*texts}
    assert all(change.peak < planned.peak_bytes for change in planned.changes)
    assert not planned.fits
    assert planned.changes[-2].peak == min(change.peak for change in planned.changes)


def test_on_several_devices(llama: Path, planned: Plan) -> None:
    one, ddp, fsdp2 = planned.placements
    assert ddp.peak == one.peak + planned.gradient_bytes
    # Adapters of 4 rows share out evenly over 4 devices, not 8.
    assert one.parts["optimizer"] / 8 < fsdp2.parts["optimizer"] < one.parts["optimizer"] / 4
    assert one.parts["base"] / 8 <= fsdp2.parts["base"] < one.parts["base"] / 7
    assert planned.placement == one
    asked = plan(CausalLM(llama), LoraCallback(r=4), length=8, devices=2, strategy="ddp")
    assert asked.placement.name == "DDP x 2"


def test_the_device_decides_how_many_scores_are_computed_at_once(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab_size=32_000)
    on = {
        kind: plan(
            CausalLM(tmp_path), LoraCallback(r=4), batch_size=2, length=512, accelerator=kind
        )
        for kind in ("cpu", "cuda")
    }
    assert on["cuda"].loss_head_bytes > 2 * on["cpu"].loss_head_bytes


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 1_500_000_000), (7, 7)],
)
def test_sizes(text: Any, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "much"}, "memory='much' is no size.*such as 24GB.*\\(memory\\)"),
        ({"memory": "0GB"}, "is no size"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0. \\(batch_size\\)"),
        ({"length": 1000}, "more than the 512 positions.*\\(length\\)"),
        ({"precison": "bf16-true"}, "no option 'precison'. Did you mean 'precision'?"),
    ],
)
def test_what_cannot_be_planned_is_refused(llama: Path, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(CausalLM(llama), LoraCallback(r=4), **options)


def test_a_model_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config.json"):
        plan(CausalLM(tmp_path), LoraCallback(r=4))


# -- the command -----------------------------------------------------------------------------------


def config_alone(folder: Path) -> Path:
    """A Llama of 70 billion weights, as its config says it."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_70_billion_weights_of_a_config_file(tmp_path: Path) -> None:
    config_alone(tmp_path / "large")
    command = Path(sys.executable).with_name("lora-lightning")
    options = ["--config", str(ROOT / "configs/sft.yaml"), "--model.model", "large"]
    done = subprocess.run(
        [command, "plan", *options, "--memory", "80GB"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "of 70,760,800,256 parameters" in done.stdout
    assert "does not fit: needs" in done.stdout
    assert "with quantize nf4" in done.stdout
    assert "the data are not read" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"large"}
    assert max(map(len, done.stdout.splitlines())) < 200


def test_command_says_what_is_wrong(llama: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:  # fmt: skip
    options = ["--config", str(ROOT / "configs/sft.yaml"), "--model.model", str(llama)]
    said = run_command(tmp_path, monkeypatch, capfd, "plan", *options, "--memory", "lots", fails=1)
    assert "memory='lots' is no size" in said
    said = run_command(tmp_path, monkeypatch, capfd, "plan", *options, "--memroy", "1GB", fails=2)
    assert "memory" in said
    assert not [*tmp_path.iterdir()]
