"""CausalLM and Seq2SeqLM: trained, evaluated and asked, through the Trainer and without it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from modules import run
from tiny_lm import tiny_llama, tiny_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lora_lightning import CausalLM, LoraCallback, Seq2SeqLM
from lora_lightning.data.samples import IGNORED

LENGTHS = (9, 4, 12, 7, 5, 12, 3, 8)
PROMPT = 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: Any) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: Any) -> str:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = T5Config(vocab_size=len(tokenizer), **sizes, **ids, dropout_rate=0.0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(10, 300, (n,), generator=generator).tolist() for n in LENGTHS]


def padded(rows: list[list[int]], filling: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filling] * (longest - len(row)) for row in rows])


def causal(rows: list[list[int]]) -> dict[str, Tensor]:
    labels = [[IGNORED] * PROMPT + row[PROMPT:] for row in rows]
    mask = padded([[1] * len(row) for row in rows], 0)
    return {"input_ids": padded(rows, 0), "attention_mask": mask, "labels": padded(labels, IGNORED)}


def seq2seq(rows: list[list[int]]) -> dict[str, Tensor]:
    inputs, targets = [row[:3] for row in rows], [row[2:] for row in rows]
    return {"input_ids": padded(inputs, 0), "attention_mask": torch.ones(len(rows), 3), "labels": padded(targets, IGNORED)}  # fmt: skip


KINDS: dict[str, Any] = {"causal": (CausalLM, causal), "seq2seq": (Seq2SeqLM, seq2seq)}


@pytest.fixture
def task(request: Any) -> tuple[Any, str, Any]:
    kind, collate = KINDS[request.param]
    return kind, request.getfixturevalue("llama" if kind is CausalLM else "t5"), collate


both = pytest.mark.parametrize("task", KINDS, indirect=True)


def loader(collate: Any, batch_size: int = 2, rows: Any = None) -> DataLoader:
    return DataLoader(rows or texts(), batch_size, collate_fn=collate)  # type: ignore[arg-type]


def scores_and_labels(module: Any, collate: Any) -> tuple[Tensor, Tensor]:
    """Of all learned tokens, by plain transformers, in float64."""
    network = module.network.double().eval()
    batch = collate(texts())
    with torch.no_grad():
        scores = network(**batch).logits
    labels = batch["labels"]
    if not network.config.is_encoder_decoder:
        scores, labels = scores[:, :-1], labels[:, 1:]
    return scores[labels != IGNORED], labels[labels != IGNORED]


@both
def test_it_learns_and_logs(tmp_path: Path, task: Any) -> None:
    kind, model, collate = task
    seed_everything(0, verbose=False)
    module = kind(model, learning_rate=1e-2)
    trainer = run(tmp_path, LoraCallback(r=8), max_epochs=25)
    trainer.fit(module, loader(collate), loader(collate))
    logged = trainer.callback_metrics
    assert {"train_loss", "val_loss", "val_perplexity", "val_accuracy"} <= set(logged)
    assert logged["val_loss"] < 4  # about 6 at the beginning; small frozen heads cannot be sure
    assert logged["val_accuracy"] > 0.5


@both
@pytest.mark.parametrize("batch_size", [1, 3])
def test_metrics_are_those_of_all_tokens(tmp_path: Path, task: Any, batch_size: int) -> None:
    kind, model, collate = task
    module = kind(model)
    trainer = run(tmp_path)
    for stage, evaluate in (("val", trainer.validate), ("test", trainer.test)):
        [logged] = evaluate(module, loader(collate, batch_size), verbose=False)
        scores, labels = scores_and_labels(module, collate)
        truth = float(cross_entropy(scores, labels))
        accuracy = float((scores.argmax(-1) == labels).double().mean())
        assert logged[f"{stage}_loss"] == pytest.approx(truth, rel=1e-6)
        assert logged[f"{stage}_perplexity"] == pytest.approx(math.exp(truth), rel=1e-5)
        assert logged[f"{stage}_accuracy"] == pytest.approx(accuracy, rel=1e-6)
        module.network.float()


@both
def test_steps_work_without_a_trainer(task: Any) -> None:
    kind, model, collate = task
    module = kind(model)
    module.configure_model()
    module.network.eval()
    batch = collate(texts())
    loss = module.training_step(batch, 0).detach()
    scores, labels = scores_and_labels(module, collate)
    assert float(loss) == pytest.approx(float(cross_entropy(scores, labels)), rel=1e-6)
