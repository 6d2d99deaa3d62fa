"""Equivalences, through the real command: two ways to say the same train the same adapter.

Each has a negative control, the same run with one thing broken on purpose, which must train another.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lora_lightning.cli.main
from tests.helpers.paths import child_environment
from tests.helpers.tiny_lm import PLAIN_WORDS, tiny_llama

pytestmark = (
    pytest.mark.slow
)  # the ideas have faster tests: test_token_mean, test_packing, test_lm_loss

BROKEN_CLASSES = '''
"""Tasks and data with one thing broken, or done another way."""
from lora_lightning.data import TextDataModule
from lora_lightning.tasks import CausalLM


class MeanOfMeans(CausalLM):
    """Every batch counts the same, however many tokens it has."""

    def batch_weight(self, batch):
        return super().batch_weight(batch) * 0 + 1

    def token_loss(self, batch):
        found = super().token_loss(batch)
        mean = found.total / super().batch_weight(batch)
        return type(found)(mean, found.correct)


class OneText(TextDataModule):
    """What shares a row is read as one text."""

    def _collator(self):
        collate = super()._collator()

        def joined(rows):
            batch = collate(rows)
            del batch["position_ids"]
            return batch

        return joined


class OtherNumbers(CausalLM):
    """Dropout that is drawn anew where layers run again."""

    def configure_model(self):
        super().configure_model()
        enable = getattr(self.network, "activation_checkpointing_enable", None)
        (enable or self.network.gradient_checkpointing_enable)(
            {"use_reentrant": False, "preserve_rng_state": False}
        )


class AllScores(CausalLM):
    """The loss from all scores at once."""

    def __init__(self, model: str, learning_rate: float):
        super().__init__(model, learning_rate=learning_rate)
        self.lm_loss.by_chunks = False


class FirstToken(AllScores):
    """Tokens are predicted from themselves."""

    def targets(self, batch):
        return batch["labels"]


class FromTheStart(TextDataModule):
    """A loader that does not find its place again."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.load_state_dict = lambda state: None
        return loader
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A user's folder: a model, files of unequal texts, a config."""
    folder = tmp_path_factory.mktemp("equivalences")
    tiny_llama(folder / "model", attention_dropout=0.1)
    tiny_llama(folder / "steady")
    (folder / "broken.py").write_text(BROKEN_CLASSES)
    dice = random.Random(0)

    def text(most: int) -> str:
        return " ".join(dice.choices(PLAIN_WORDS, k=dice.randint(1, most)))

    for name, number in {"eight.jsonl": 8, "my.jsonl": 48}.items():
        rows = [
            {"prompt": text(6), "completion": " " + text(1 + 4 * (i % 8))} for i in range(number)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": "steady", "learning_rate": 0.01}
    config = {
        "seed_everything": 1,
        "compare_with_base": False,
        "lora": {"r": 4, "lora_alpha": 8},
        "model": {"class_path": "lora_lightning.CausalLM", "init_args": options},
        "data": {
            "class_path": "lora_lightning.TextDataModule",
            "init_args": {"train": "my.jsonl", "val": 0.0, "batch_size": 8, "max_length": 128},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "precision": "64-true",  # so that what is the same is so to ten digits
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def fit(place: Path, monkeypatch: Any, request: Any) -> Any:
    """Run `lora-lightning fit` and return the adapter that comes out.

    In this process (importing torch takes seconds), but for several processes.
    """
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    counter = itertools.count()

    def run(options: str, at: str = "", alone: bool = True) -> dict[str, torch.Tensor]:
        directory = at or f"runs/{request.node.name}/{next(counter)}"
        arguments = ["fit", "--config", "my.yaml", "--trainer.default_root_dir", directory]
        arguments += options.split()
        if alone:
            monkeypatch.setattr(sys, "argv", ["lora-lightning", *arguments])
            lora_lightning.cli.main.main()
        else:
            command = [str(Path(sys.executable).parent / "lora-lightning"), *arguments]
            done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
        return trained(place / directory)

    return run


def trained(directory: Path) -> dict[str, torch.Tensor]:
    newest = max((directory / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    state = torch.load(newest, weights_only=True)["state_dict"]
    # What starts at 0, so that all of it is update
    return {key: tensor for key, tensor in state.items() if key.endswith("lora_B")}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """||first - second|| / ||second|| of all tensors as one vector."""
    assert first.keys() == second.keys()
    a, b = (torch.cat([state[key].flatten() for key in sorted(state)]) for state in (first, second))
    assert b.norm() > 0
    return float((a - b).norm() / b.norm())


# In float64, but for norms and softmax, which transformers computes in float32 in any case: where
# sums are taken in another order, one of its last digits falls the other way now and then.
EXACT = 1e-6
BROKEN = 1e-3  # a negative control is off by more


def test_accumulation(fit: Any) -> None:
    """8 x 1 example is 1 x 8 examples, however long they are."""
    data = "--data.train eight.jsonl --trainer.max_epochs 4"
    whole = fit(f"{data} --data.batch_size 8")
    in_parts = "--data.batch_size 1 --trainer.accumulate_grad_batches 8"
    assert difference(fit(f"{data} {in_parts}"), whole) < EXACT
    by_three = "--data.batch_size 3 --trainer.accumulate_grad_batches 3"  # 3, 3 and 2 examples
    assert difference(fit(f"{data} {by_three}"), whole) < EXACT
    broken = "--model broken.MeanOfMeans --model.model steady --model.learning_rate 0.01"
    assert difference(fit(f"{data} {in_parts} {broken}"), whole) > BROKEN


def test_packing(fit: Any) -> None:
    """Examples that share a row are learned as those that have one each."""
    data = "--data.batch_size 48 --trainer.max_epochs 4"  # an epoch is a batch
    alone = fit(data)
    assert difference(fit(f"{data} --data.packing true"), alone) < EXACT
    for attention in ("eager", "sdpa"):
        packed = f"{data} --data.packing true --model.attn_implementation {attention}"
        assert difference(fit(packed), alone) < EXACT
    broken = "--data broken.OneText --data.train my.jsonl --data.val 0 --data.max_length 128"
    assert difference(fit(f"{broken} {data} --data.packing true"), alone) > BROKEN


SAVE = (
    "--trainer.callbacks lightning.pytorch.callbacks.ModelCheckpoint "
    "--trainer.callbacks.every_n_train_steps 4 --trainer.callbacks.filename {step} "
    "--trainer.callbacks.save_top_k -1"
)
IN_MEMORY, PACKED = "--data.batch_size 3", "--data.packing true --data.batch_size 2"
STREAMED = "--data.streaming true --data.shuffle_buffer 16 --data.batch_size 3"
LOADING = {
    "in memory": IN_MEMORY,
    "workers": f"{IN_MEMORY} --data.num_workers 2",
    "packed": PACKED,
    "packed, workers": f"{PACKED} --data.num_workers 2",
    "streamed": STREAMED,
    "streamed, workers": f"{STREAMED} --data.num_workers 2",
    "streamed, packed": f"{STREAMED} --data.packing true",
}
# The broken loaders are those in memory.
FORGETFUL = "--data broken.FromTheStart --data.train my.jsonl --data.val 0 --data.max_length 128"


@pytest.mark.parametrize("loading", LOADING)
def test_resume_in_mid_epoch(fit: Any, place: Path, request: Any, loading: str) -> None:
    """After step 4 of an epoch, with dropout, to the last bit."""
    run = "--model.model model --lora.lora_dropout 0.1 --trainer.max_steps 20 LOADING " + SAVE
    run += " --trainer.max_epochs -1" if "streamed" in loading else ""
    folder = f"runs/{request.node.name.replace(' ', '_')}"
    straight = fit(run.replace("LOADING", LOADING[loading]), at=f"{folder}/straight")
    (middle,) = (place / folder / "straight").rglob("step=4.ckpt")
    resumed = run.replace("LOADING", f"{LOADING[loading]} --ckpt_path {middle}")
    assert difference(fit(resumed, at=f"{folder}/resumed"), straight) == 0
    if loading == "in memory":
        broken = run.replace("LOADING", f"{FORGETFUL} {IN_MEMORY} --ckpt_path {middle}")
        assert difference(fit(broken, at=f"{folder}/broken"), straight) > BROKEN


def test_two_processes(fit: Any) -> None:
    """2 processes x 4 examples are 1 x 8."""
    one = fit("--data.batch_size 8")
    two = "--data.batch_size 4 --trainer.devices 2 --trainer.strategy ddp"
    assert difference(fit(two, alone=False), one) < EXACT
    broken = "--model broken.MeanOfMeans --model.model steady --model.learning_rate 0.01"
    assert difference(fit(f"{two} {broken}", alone=False), one) > BROKEN


def test_gradient_checkpointing(fit: Any) -> None:
    """Layers that run again compute the same, dropout included."""
    with_dropout = "--model.model model --lora.lora_dropout 0.1"
    kept = fit(with_dropout)
    assert difference(fit(f"{with_dropout} --model.gradient_checkpointing true"), kept) == 0
    broken = "--model broken.OtherNumbers --model.model model --model.learning_rate 0.01"
    assert difference(fit(f"{broken} --lora.lora_dropout 0.1"), kept) > BROKEN


def test_chunked_loss(fit: Any, monkeypatch: Any) -> None:
    """The loss in chunks is the loss from all scores."""
    all_scores = fit("--model broken.AllScores --model.model steady --model.learning_rate 0.01")
    assert difference(fit(""), all_scores) < EXACT
    broken = "--model broken.FirstToken --model.model steady --model.learning_rate 0.01"
    assert difference(fit(broken), all_scores) > BROKEN
