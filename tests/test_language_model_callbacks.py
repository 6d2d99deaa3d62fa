"""Progress, samples and comparison with the language models of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from modules import run
from tiny_lm import tiny_llama, tiny_tokenizer
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback, TextSamples, compare_with_base
from lora_lightning.tasks import CausalLM

TEXTS = [
    "Paris is the capital of France.",
    "The quick brown fox jumps over the lazy dog.",
    "How are you today?",
    "It is five.",
    "They played in the garden all day.",
]


def padded(texts: list[str]) -> dict[str, torch.Tensor]:
    batch = tiny_tokenizer()(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}


def loader() -> Any:
    return DataLoader(TEXTS, batch_size=1, collate_fn=padded)  # type: ignore[arg-type]


def losses(folder: str, module: CausalLM | None = None) -> torch.Tensor:
    """Summed loss and number of tokens of each text, by a plain forward pass in float64."""
    from transformers import AutoModelForCausalLM

    network: Any = (
        AutoModelForCausalLM.from_pretrained(folder) if module is None else module.network
    )
    network = network.double().eval()
    rows = []
    for text in TEXTS:
        batch = padded([text])
        with torch.no_grad():
            scores = network(input_ids=batch["input_ids"]).logits[0, :-1]
        targets = batch["labels"][0, 1:]
        total = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
        rows.append(torch.stack([total, torch.tensor(float(len(targets))).double()]))
    return torch.stack(rows)


def test_a_causal_lm(tmp_path: Path, capsys: Any) -> None:
    folder = str(tiny_llama(tmp_path / "model"))
    module = CausalLM(folder, learning_rate=3e-2)
    texts = TextSamples(["Paris is the"], max_new_tokens=6)
    lora = LoraCallback(r=8)
    options: Any = {"max_epochs": 8, "logger": CSVLogger(tmp_path), "log_every_n_steps": 5}
    trainer = run(tmp_path, lora, texts, **options)
    trainer.fit(module, loader(), loader())

    read = sum(len(tiny_tokenizer()(text)["input_ids"]) for text in TEXTS)
    out = capsys.readouterr().out
    assert f"trained on {8 * read} tokens in " in out
    (path,) = tmp_path.rglob("metrics.csv")
    assert "tokens_per_second" in path.read_text().splitlines()[0]
    (path,) = tmp_path.rglob("samples.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(5, 45, 5))
    assert "France." in rows[-1]["tuned"]
    assert rows[-1]["base"] != rows[-1]["tuned"]

    compared = compare_with_base(trainer)
    (base, tokens), (tuned, _) = losses(folder).T, losses(folder, module).T
    for found, total in ((compared.base, base), (compared.tuned, tuned)):
        loss = total.sum() / tokens.sum()
        assert found["val_loss"] == pytest.approx(float(loss), rel=1e-5)
        assert found["val_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    difference = (tuned - base) / tokens
    spread = difference - (tuned - base).sum() / tokens.sum()
    noise = ((tokens * spread) ** 2).sum().mul(5 / 4).sqrt() / tokens.sum()
    assert compared.noise == pytest.approx(float(noise), rel=1e-4)
    assert compared.verdict.startswith("the adapter lowers val_loss by ")
    assert " +- " in compared.verdict
