"""Progress, samples and comparison with the language models of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback, TextSamples, compare_with_base
from lora_lightning.data import TextDataModule
from lora_lightning.data.samples.sample import Chat, Document, prompt_and_answer
from lora_lightning.errors import ConfigError
from lora_lightning.tasks import CausalLM
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.tiny_lm import tiny_llama, tiny_tokenizer

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


@pytest.mark.slow
def test_a_causal_lm(tmp_path: Path, capsys: Any) -> None:
    folder = str(tiny_llama(tmp_path / "model"))
    module = CausalLM(folder, learning_rate=3e-2)
    texts = TextSamples(["Paris is the"], max_new_tokens=6)
    lora = LoraCallback(r=8)
    options: Any = {"max_epochs": 8, "logger": CSVLogger(tmp_path), "log_every_n_steps": 5}
    trainer = make_trainer(tmp_path, lora, texts, **options)
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
    error = ((tokens * spread) ** 2).sum().mul(5 / 4).sqrt() / tokens.sum()
    assert compared.standard_error == pytest.approx(float(error), rel=1e-4)
    assert compared.verdict.startswith("the adapter lowers val_loss by ")
    assert " +- " in compared.verdict


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "One two three"}]}
    for n in range(8)
]  # fmt: skip
PAIRS = [{"prompt": f"Question {n}: ", "completion": "It is five."} for n in range(8)]
DOCUMENTS = [{"text": "Once upon a time there was a little girl and a big dog."}]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata
@pytest.mark.parametrize(
    ("template", "records", "prompt", "expected"),
    [
        (None, PAIRS, "Question 0: ", "It is five."),
        ("chatml", CHATS, "user: What is 0?", "One two three"),
        (None, DOCUMENTS, "Once upon a time there was a little", " girl and a big dog."),
    ],
)
def test_prompts_of_the_data_module(
    tmp_path: Path, template: str | None, records: Any, prompt: str, expected: str
) -> None:
    folder = str(tiny_llama(tmp_path / "model", template))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = TextDataModule(str(path), str(path), batch_size=4)
    texts = TextSamples(max_new_tokens=3)
    lora = LoraCallback(r=2)
    options: Any = {"max_epochs": 1, "logger": CSVLogger(tmp_path)}
    make_trainer(tmp_path, lora, texts, **options).fit(CausalLM(folder), data)
    row = rows_of(tmp_path)[0]
    assert row["prompt"] == prompt
    assert row["expected"] == expected
    # What the model reads is what it is trained to answer.
    example = data.encoding.encoder.encode(data.records("val")[0])[0]
    asked = texts._asked[0][1]
    assert example.input_ids[: len(asked)] == asked
    if records is not DOCUMENTS:
        first = next(n for n, label in enumerate(example.labels) if label != -100)
        assert first == len(asked)


def test_prompt_and_answer() -> None:
    chat = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    )
    assert prompt_and_answer(Chat(chat, "")) == (Chat(chat[:3], ""), "d")
    assert prompt_and_answer(Chat(chat, "", unlearned=(3,))) == (Chat(chat[:1], ""), "b")
    assert prompt_and_answer(Chat(chat[:3], "", unlearned=(1,))) == (Chat(chat[:1], ""), "b")
    assert prompt_and_answer(Chat(chat[:1], "")) == (Chat(chat[:1], ""), "")
    assert prompt_and_answer(Document("a b", "")) == (Document("a b", ""), "")


def test_no_validation_data_for_prompts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PAIRS))
    folder = str(tiny_llama(tmp_path / "model"))
    with pytest.raises(ConfigError, match="the validation data give none, so name some"):
        make_trainer(tmp_path, TextSamples()).fit(CausalLM(folder), TextDataModule(str(path), 0))
