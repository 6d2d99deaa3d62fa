"""A checkpoint of a task is enough by itself: model, precision, tokenizer, classes, padding.

The truth is the module that was trained, in memory.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning import (
    CausalLM,
    LoraCallback,
    SequenceClassification,
    TextClassificationDataModule,
    TextDataModule,
    TokenClassification,
    TokenClassificationDataModule,
    load_from_checkpoint,
)
from lora_lightning.checkpoint.state_dict import OPTIONS
from lora_lightning.errors import AdapterMismatchError, CheckpointError, ModelError
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.tensors import bit_equal
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_lm import tiny_llama, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8]])


def texts(folder: Path) -> str:
    rows = [{"prompt": f"number {n}:", "completion": f" {n + 1}"} for n in range(8)]
    (folder / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "my.jsonl")


def train(module: Any, data: Any, folder: Path, **options: Any) -> Path:
    options = {"max_steps": 2, "limit_val_batches": 0, **options}
    trainer = make_trainer(folder, LoraCallback(r=2), **options)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def causal(
    folder: Path, tmp_path: Path, trainer: dict[str, Any] | None = None, **options: Any
) -> Any:
    module = CausalLM(str(folder), **options)
    data = TextDataModule(texts(tmp_path), batch_size=4, max_length=32)
    return module, train(module, data, tmp_path, **(trainer or {}))


@pytest.mark.parametrize(
    ("precision", "dtype", "found"),
    [
        ("32-true", None, torch.float32),
        ("32-true", "bfloat16", torch.bfloat16),
        ("bf16-true", None, torch.bfloat16),
        ("bf16-mixed", None, torch.float32),
        ("64-true", None, torch.float64),
    ],
)
def test_the_precision_comes_from_the_file(
    precision: str, dtype: str | None, found: torch.dtype, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base")
    module, file = causal(base, tmp_path, {"precision": precision}, dtype=dtype)
    loaded = load_from_checkpoint(CausalLM, file).eval()
    assert {p.dtype for n, p in loaded.named_parameters() if ".adapters." not in n} == {found}
    assert bit_equal(loaded({"input_ids": IDS}), module.eval()({"input_ids": IDS}))


def test_from_another_folder_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that was named relative to the working directory."""
    tiny_llama(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    module, file = causal(Path("base"), tmp_path, max_new_tokens=3, learning_rate=1e-3, generation={"do_sample": False})  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load_from_checkpoint(CausalLM, file).eval()
    assert loaded.max_new_tokens == 3
    assert loaded.learning_rate == 1e-3
    assert loaded.generation == {"do_sample": False}
    monkeypatch.chdir(tmp_path)
    assert loaded.generate(IDS) == module.eval().generate(IDS)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"no existing folder"):
        load_from_checkpoint(CausalLM, file)
    other = load_from_checkpoint(CausalLM, file, model=str(tmp_path / "moved"))
    assert bit_equal(other.eval()({"input_ids": IDS}), module({"input_ids": IDS}))


def test_arguments_as_people_give_them(tmp_path: Path) -> None:
    """Paths, dtypes of torch, and what tutorials give Lightning's own method."""
    base = tiny_llama(tmp_path / "base")
    module = CausalLM(base, dtype=torch.bfloat16)  # type: ignore[arg-type]
    file = train(module, TextDataModule(texts(tmp_path), max_length=32), tmp_path)
    assert module.model_name == str(base)
    for more in ({"map_location": "cpu"}, {"map_location": torch.device("cpu")}, {"strict": False}):
        loaded = load_from_checkpoint(CausalLM, file, model=base, **more)  # type: ignore[arg-type]
        assert bit_equal(loaded.eval()({"input_ids": IDS}), module.eval()({"input_ids": IDS}))
    meta = load_from_checkpoint(CausalLM, file, map_location="meta")
    assert all(p.is_meta for p in meta.parameters())
    with pytest.raises(CheckpointError, match=r"map_location is a dict; name the device"):
        load_from_checkpoint(CausalLM, file, map_location={"cuda:0": "cpu"})
    with pytest.raises(
        CheckpointError, match=r"is the checkpoint of a CausalLM, not of a Sequence"
    ):
        load_from_checkpoint(SequenceClassification, file)


def test_the_tokenizer_of_the_data(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shutil.copy(base / "config.json", tmp_path / "tokenizer")
    module = CausalLM(str(base))
    data = TextDataModule(texts(tmp_path), tokenizer=str(tmp_path / "tokenizer"), max_length=32)
    file = train(module, data, tmp_path)
    loaded = load_from_checkpoint(CausalLM, file)
    assert loaded.tokenizer.pad_token == "!"
    assert loaded.tokenizer.name_or_path == str(tmp_path / "tokenizer")


def labelled(folder: Path) -> TextClassificationDataModule:
    words = ("good", "bad", "red") * 16
    rows = ["text,label", *(f"the film was {w},{w}" for w in words)]
    (folder / "my.csv").write_text("\n".join(rows))
    return TextClassificationDataModule(str(folder / "my.csv"), max_length=16, batch_size=4)


def test_classes_of_the_data(tmp_path: Path) -> None:
    base = save_tiny_bert(tmp_path / "base")
    module = SequenceClassification(str(base), class_weights={"red": 2.0}, label_smoothing=0.1)
    file = train(module, labelled(tmp_path), tmp_path)
    loaded = load_from_checkpoint(SequenceClassification, file).eval()
    assert loaded.label_names == module.label_names == ["bad", "good", "red"]
    assert (loaded.class_weights, loaded.label_smoothing) == ({"red": 2.0}, 0.1)
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    assert bit_equal(loaded(batch), module.eval()(batch))
    assert loaded.predict_step(batch, 0)["labels"] == module.predict_step(batch, 0)["labels"]


def test_the_padding_of_a_decoder(tmp_path: Path) -> None:
    """Which finds the last token of a text by it."""
    base = tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    module = SequenceClassification(str(base))
    file = train(module, labelled(tmp_path), tmp_path)
    loaded = load_from_checkpoint(SequenceClassification, file).eval()
    pad = module.network.config.pad_token_id
    batch = {"input_ids": torch.tensor([[5, 6, 7, pad], [5, 6, 7, 8]])}
    assert bit_equal(loaded(batch), module.eval()(batch))


def test_of_words(tmp_path: Path) -> None:
    base = save_tiny_bert(tmp_path / "base")
    rows = [{"tokens": ["the", f"film{n}"], "labels": ["O", "B-X"]} for n in range(16)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    module = TokenClassification(str(base))
    data = TokenClassificationDataModule(str(tmp_path / "my.jsonl"), max_length=16)
    loaded = load_from_checkpoint(TokenClassification, train(module, data, tmp_path)).eval()
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    assert bit_equal(loaded(batch), module.eval()(batch))
    assert set(loaded.entity_metrics) == {"val", "test"}


class WithAdvantages(CausalLM):
    """Derives, and takes no other options."""


class WithOwnOptions(CausalLM):
    def __init__(self, folder: str, factor: float) -> None:
        super().__init__(folder)
        self.factor = factor
        self.save_hyperparameters()


def test_tasks_that_derive(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    data = TextDataModule(texts(tmp_path), batch_size=4, max_length=32)
    module = WithAdvantages(str(base))
    loaded = load_from_checkpoint(WithAdvantages, train(module, data, tmp_path)).eval()
    assert bit_equal(loaded({"input_ids": IDS}), module.eval()({"input_ids": IDS}))
    own = WithOwnOptions(str(base), 0.5)
    loaded = load_from_checkpoint(WithOwnOptions, train(own, data, tmp_path))
    assert loaded.factor == 0.5


def test_what_a_file_cannot_say(tmp_path: Path) -> None:
    module, file = causal(tiny_llama(tmp_path / "base"), tmp_path, trust_remote_code=True)
    saved = torch.load(file, weights_only=True)
    assert not saved[OPTIONS].keys() & {"trust_remote_code", "compile"}
    assert "hyper_parameters" not in saved  # which LightningCLI would take for its --ckpt_path
    assert module.options.trust_remote_code
    assert not load_from_checkpoint(CausalLM, file).options.trust_remote_code


# -- another precision -----------------------------------------------------------------------------


def refused(file: Path, base: Path, tmp_path: Path, **options: Any) -> list[str]:
    """What is said by the two ways in which a base can be another."""
    with pytest.raises(AdapterMismatchError) as first:
        load_from_checkpoint(CausalLM, file, model=str(base), **options)
    data = TextDataModule(texts(tmp_path), batch_size=4, max_length=32)
    with pytest.raises(AdapterMismatchError) as second:
        make_trainer(tmp_path, LoraCallback(r=2)).test(
            CausalLM(str(base), **options), data, ckpt_path=str(file)
        )
    return [str(first.value), str(second.value)]


def test_a_base_that_differs_in_precision_only(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    _, file = causal(base, tmp_path)
    for text in refused(file, base, tmp_path, dtype="bfloat16"):
        assert "trained on a base in float32, and this one, which can be the same, is in" in text
        assert "Load the base in float32. (model.dtype, trainer.precision)" in text
        assert "another base" not in text
    _, file = causal(base, tmp_path, dtype="bfloat16")
    for text in refused(file, base, tmp_path, dtype="float32"):
        assert (
            "trained on a base in bfloat16, and this one, which is the same, is in float32" in text
        )


def test_a_base_that_differs_otherwise_too(tmp_path: Path) -> None:
    base, other = (
        tiny_llama(tmp_path / "base"),
        tiny_llama(tmp_path / "other", initializer_range=0.2),
    )
    _, file = causal(base, tmp_path, dtype="bfloat16")
    for text in refused(file, other, tmp_path, dtype="float32"):
        assert "trained on another base model" in text
