"""Generated text while training: what is shown, where it goes, and that nothing else moves."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback
from lora_lightning.callbacks import TextSamples, generation
from lora_lightning.callbacks.text_loggers import log_texts
from lora_lightning.callbacks.text_samples import as_table
from lora_lightning.errors import ConfigError
from lora_lightning.training.messages import rendered
from tests.helpers.lightning_modules import Net, make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.tiny_lm import tiny_llama, tiny_tokenizer

PROMPT = "What is the capital of"


class Talker(LightningModule):
    """A user's module around a Llama, with dropout."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.model_name = folder
        self.lm = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.1)
        self.lm.train()

    def _loss(self, batch: Any) -> Any:
        return self.lm(input_ids=batch, labels=batch).loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


class Talk(LightningDataModule):
    def __init__(self, folder: str) -> None:
        super().__init__()
        ids = tiny_tokenizer()(PROMPT + " France? Paris is the capital of France.")["input_ids"]
        self.rows = [torch.tensor(ids) for _ in range(12)]

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=4)

    def sample_prompts(self, count: int) -> list[Any]:
        return [PROMPT, "The quick brown", "Once upon"][:count]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("llama")))


def fit(folder: str, where: Path, *callbacks: Any, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    module = Talker(folder)
    options = {"max_epochs": 4, "logger": CSVLogger(where), **options}
    lora = LoraCallback(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    trainer = make_trainer(where, lora, *callbacks, **options)
    trainer.fit(module, Talk(folder))
    return trainer


def samples(where: Path) -> list[dict[str, Any]]:
    (path,) = where.rglob("samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy(network: Any, prompt: str, count: int) -> str:
    """Greedy decoding by one forward pass a token."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            token = network(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            if token == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_base_and_tuned_text(tmp_path: Path, folder: str, capsys: Any) -> None:
    callback = TextSamples(max_new_tokens=12)
    trainer = fit(folder, tmp_path, callback)
    rows = samples(tmp_path)
    assert [row["step"] for row in rows] == [3, 3, 6, 6, 9, 9, 12, 12]
    assert [row["prompt"] for row in rows[:2]] == [PROMPT, "The quick brown"]
    base = Talker(folder).lm.eval()
    tuned = trainer.lightning_module.lm.eval()
    for row in rows[-2:]:
        assert row["base"] == greedy(base, row["prompt"], 12)
        assert row["tuned"] == greedy(tuned, row["prompt"], 12)
        assert row["base"] != row["tuned"]
    assert rows[-2]["tuned"].startswith(" France")
    assert len({row["base"] for row in rows}) == 2  # written once
    shown = capsys.readouterr().out
    assert shown.count("(as above)") == 2 * 3  # and shown once, of four times
    assert "samples at step 12" in shown
    assert "│ tuned  │  France" in shown


def test_text_of_a_base_that_is_not_disabled(tmp_path: Path, folder: str, monkeypatch: Any) -> None:
    from lora_lightning.callbacks import text_samples

    monkeypatch.setattr(text_samples, "disable_adapter", lambda module: nullcontext())
    fit(folder, tmp_path, TextSamples(max_new_tokens=12))
    base = Talker(folder).lm.eval()
    assert samples(tmp_path)[0]["base"] != greedy(base, PROMPT, 12)


SAMPLED = {"do_sample": True, "temperature": 2.0}


def trained(folder: str, where: Path, *callbacks: Any, **options: Any) -> dict[str, Any]:
    module = fit(folder, where, *callbacks, **options).lightning_module
    return {key: value for key, value in module.state_dict().items() if ".adapters." in key}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first | second)


@pytest.mark.parametrize(
    "precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("every", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_training_goes_on_as_if_nothing_was_written(
    tmp_path: Path, folder: str, precision: Any, every: int | None
) -> None:
    """Bit for bit, with dropout in base and adapter and shuffled data."""
    plain = trained(folder, tmp_path / "a", precision=precision)
    texts = TextSamples(every_n_steps=every, max_new_tokens=5, generation=SAMPLED)
    assert same(plain, trained(folder, tmp_path / "b", texts, precision=precision))
    assert len(samples(tmp_path / "b")) == (24 if every else 8)


@pytest.mark.parametrize(
    "forgotten", ["set_random_state", pytest.param("_set_modes", marks=pytest.mark.slow)]
)
def test_what_is_restored_is_needed(
    tmp_path: Path, folder: str, monkeypatch: Any, forgotten: str
) -> None:
    plain = trained(folder, tmp_path / "a")
    monkeypatch.setattr(generation, forgotten, lambda *_: None)
    texts = TextSamples(every_n_steps=1, max_new_tokens=5, generation=SAMPLED)
    assert not same(plain, trained(folder, tmp_path / "b", texts))


def test_gradient_checkpointing_stays_on(tmp_path: Path, folder: str) -> None:
    class Checkpointed(Talker):
        def __init__(self, folder: str) -> None:
            super().__init__(folder)
            # Its name before transformers 5.20
            enable = getattr(self.lm, "activation_checkpointing_enable", None)
            (enable or self.lm.gradient_checkpointing_enable)({"use_reentrant": False})
            self.lm.config.use_cache = False

    module = Checkpointed(folder)
    lora = LoraCallback(r=2, target_modules=["q_proj"])
    callback = TextSamples(every_n_steps=1, max_new_tokens=5)
    trainer = make_trainer(tmp_path, lora, callback, logger=CSVLogger(tmp_path))
    trainer.fit(module, Talk(folder))
    assert module.lm.is_gradient_checkpointing
    assert module.lm.config.use_cache is False
    assert samples(tmp_path)[0]["base"] == greedy(Talker(folder).lm.eval(), PROMPT, 5)


def test_sampling_is_the_same_at_every_call(tmp_path: Path, folder: str) -> None:
    """So that what changes in a text is the model."""
    texts = TextSamples(every_n_steps=1, max_new_tokens=8, generation=SAMPLED)
    lora = LoraCallback(r=2, target_modules=["q_proj"])
    trainer = make_trainer(tmp_path, lora, texts, logger=CSVLogger(tmp_path), max_epochs=1)
    module = Talker(folder)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    trainer.fit(module, Talk(folder))
    rows = samples(tmp_path)
    assert len(rows) == 6
    assert all(row["tuned"] == row["base"] for row in rows)
    assert rows[0]["base"] != greedy(Talker(folder).lm.eval(), PROMPT, 8)


def test_stop_strings_end_a_text(tmp_path: Path, folder: str) -> None:
    options: dict[str, Any] = {"num_prompts": 1, "max_new_tokens": 8}
    fit(folder, tmp_path / "a", TextSamples(**options), max_epochs=1)
    text = samples(tmp_path / "a")[0]["base"]
    generation = {"stop_strings": [text[1:3]]}
    fit(folder, tmp_path / "b", TextSamples(**options, generation=generation), max_epochs=1)
    stopped = samples(tmp_path / "b")[0]["base"]
    assert len(stopped) < len(text)
    assert text.startswith(stopped)


def test_chats_without_adapter(tmp_path: Path) -> None:
    folder = str(tiny_llama(tmp_path / "model", "chatml"))
    chat = [{"role": "system", "content": "Hello"}, {"role": "user", "content": "How are you?"}]
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, TextSamples([chat], max_new_tokens=4), logger=CSVLogger(tmp_path)
    )
    module = Talker(folder)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    trainer.fit(module, Talk(folder))
    (row,) = samples(tmp_path)
    assert list(row) == ["step", "prompt", "tuned"]
    assert row["prompt"] == "system: Hello\nuser: How are you?"
    tokenizer = tiny_tokenizer("chatml")
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = Talker(folder).lm.eval().generate(ids, max_new_tokens=4, do_sample=False)[0]
    assert row["tuned"] == tokenizer.decode(written[ids.shape[1] :], skip_special_tokens=True)


class Translator(LightningModule):
    """A user's module around a T5."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(3)
        tokenizer = tiny_tokenizer()
        self.lm = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                decoder_start_token_id=0, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.lm(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_an_encoder_decoder(tmp_path: Path, folder: str) -> None:
    tokenizer = tiny_tokenizer()
    options: Any = {"generation": {"min_new_tokens": 3}, "tokenizer": tokenizer}
    texts = TextSamples(["Hello world"], max_new_tokens=5, **options)
    lora = LoraCallback(r=2, target_modules=["q", "v"])
    trainer = make_trainer(tmp_path, lora, texts, logger=CSVLogger(tmp_path))
    trainer.fit(Translator(), Talk(folder).train_dataloader())
    (row,) = samples(tmp_path)  # there is no validation: at the end
    assert row["step"] == 3
    ids = tokenizer("Hello world", return_tensors="pt")["input_ids"]
    written = Translator().lm.eval().generate(ids, max_new_tokens=5, min_new_tokens=3)[0]
    assert row["base"] == tokenizer.decode(written, skip_special_tokens=True) != ""


class Two(Talker):
    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.other = Talker(folder).lm


class Nameless(Talker):
    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        del self.model_name


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Two, {}, r"exactly one Hugging Face model .* Two has lm, other\. \(trainer\.callbacks\)"),
        (
            Nameless,
            {},
            r"Nameless has no `model_name` to take it from, so name one\. \(tokenizer\)",
        ),
        (Talker, {"generation": {"temprature": 1}}, r"Did you mean 'temperature'\? \(generation\)"),
        (
            Talker,
            {"generation": {"max_length": 9}},
            r"'max_length' cannot be had: .* \(generation\)",
        ),
        (Talker, {"prompts": ["a " * 600]}, r"tokens, and with max_new_tokens=60 more the model"),
    ],
)
def test_refusals(tmp_path: Path, folder: str, kind: Any, options: Any, message: str) -> None:
    trainer = make_trainer(tmp_path, TextSamples(**options))
    with pytest.raises(ConfigError, match=message):
        trainer.fit(kind(folder), Talk(folder))
    assert trainer.global_step == 0


def test_no_prompts(tmp_path: Path, folder: str) -> None:
    trainer = make_trainer(tmp_path, TextSamples())
    with pytest.raises(ConfigError, match=r"TextSamples has no prompts: .* \(prompts\)"):
        trainer.fit(Talker(folder), Talk(folder).train_dataloader())
    with pytest.raises(ConfigError, match="Net has none"):
        make_trainer(tmp_path, TextSamples(["a"])).fit(Net(), Talk(folder).train_dataloader())
    with pytest.raises(ConfigError, match=r"must be at least 1, found 0. \(max_new_tokens\)"):
        TextSamples(max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"must be at least 1, found 0. \(every_n_steps\)"):
        TextSamples(every_n_steps=0)
    with pytest.raises(ConfigError, match="is an empty list"):
        TextSamples([])


def test_nothing_outside_of_fit(tmp_path: Path, folder: str, capsys: Any) -> None:
    trainer = fit(folder, tmp_path, TextSamples(max_new_tokens=2), max_epochs=1)
    capsys.readouterr()
    trainer.validate(trainer.lightning_module, Talk(folder), verbose=False)
    assert capsys.readouterr().out == ""


# -- where the texts go ----------------------------------------------------------------------------

ROWS = [{"prompt": "a", "base": "b```", "tuned": "c"}, {"prompt": "d", "base": "e", "tuned": "f"}]
BLOCK = "**prompt**\n\n```\na\n```\n\n**base**\n\n````\nb```\n````\n\n**tuned**\n\n```\nc\n```"


class Recorder:
    """Stands for a logger or its experiment: notes all calls."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.run_id = "run"

    @property
    def experiment(self) -> Recorder:
        return Recorder(self.calls)

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        self.calls.append((tag, text_string, global_step))

    def log_text(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("TensorBoardLogger", ("samples/0", BLOCK, 7)),
        (
            "WandbLogger",
            (
                (),
                {
                    "key": "samples",
                    "columns": ["step", "prompt", "base", "tuned"],
                    "data": [["7", "a", "b```", "c"], ["7", "d", "e", "f"]],
                },
            ),
        ),
        ("CometLogger", ((BLOCK,), {"step": 7, "metadata": {"name": "samples"}})),
    ],
)
def test_loggers_with_text(name: str, first: Any) -> None:
    calls: list[Any] = []
    logger = type("Users", (type(name, (Recorder,), {}),), {})(calls)  # a subclass, too
    log_texts(logger, "samples", ROWS, 7)
    assert calls[0] == first


def test_mlflow() -> None:
    calls: list[Any] = []
    log_texts(type("MLFlowLogger", (Recorder,), {})(calls), "samples", ROWS, 7)
    (((run_id, text, path), _),) = calls
    assert (run_id, path) == ("run", "samples/step_7.md")
    assert text.startswith(BLOCK)


def test_loggers_of_lightning_have_these_names() -> None:
    from lightning.pytorch import loggers

    from lora_lightning.callbacks.text_loggers import _WAYS

    assert all(issubclass(getattr(loggers, name), Logger) for name in _WAYS)


def test_a_table_in_80_columns(monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"prompt": "x" * 500, "base": "one two [bold] " * 20, "tuned": "ja\nnein"}]
    lines = rendered(as_table(rows, "samples at step 3")).splitlines()
    assert max(map(len, lines)) == 80
    assert any("[bold]" in line for line in lines)
    assert "│ prompt │ [...]xxx" in lines[2]
    assert [line[:15].rstrip() for line in lines[-3:-1]] == ["│ tuned  │ ja", "│        │ nein"]


# -- several processes -----------------------------------------------------------------------------


def on_two(folder: str, where: str) -> list[str]:
    texts = TextSamples(every_n_steps=1, max_new_tokens=5)
    fit(folder, Path(where), texts, strategy="ddp", devices=2, max_epochs=1)
    return [str(texts._base)]


@pytest.mark.slow
def test_ddp(tmp_path: Path, folder: str) -> None:
    first, second = on_processes(2, on_two, folder, str(tmp_path))
    assert first == [
        str([greedy(Talker(folder).lm.eval(), p, 5) for p in (PROMPT, "The quick brown")])
    ]
    assert second == ["None"]  # rank 1 only waits
    assert len(samples(tmp_path)) == 4  # two steps


class Sharded(Talker):
    def configure_model(self) -> None:
        for layer in self.lm.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]
        fully_shard(self, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def forward(self, batch: Any) -> Any:
        return self.lm(input_ids=batch, labels=batch).loss

    def _loss(self, batch: Any) -> Any:
        return self(batch)


def on_two_sharded(folder: str, where: str, writes: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    module = Sharded(folder)
    texts = [TextSamples(every_n_steps=1, max_new_tokens=5)] if writes else []
    lora = LoraCallback(r=4, target_modules=["q_proj", "v_proj"])
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    options: Any = {"strategy": strategy, "devices": 2, "logger": CSVLogger(where)}
    make_trainer(Path(where), lora, *texts, **options).fit(module, Talk(folder))
    return {k: v.full_tensor() for k, v in module.state_dict().items() if ".adapters." in k}


@pytest.mark.slow
def test_fsdp2(tmp_path: Path, folder: str) -> None:
    plain, _ = on_processes(2, on_two_sharded, folder, str(tmp_path / "a"), False)
    written, other = on_processes(2, on_two_sharded, folder, str(tmp_path / "b"), True)
    assert same(plain, written)
    assert same(written, other)
    rows = samples(tmp_path / "b")
    assert len(rows) == 4
    assert rows[0]["base"] == greedy(Talker(folder).lm.eval(), PROMPT, 5)
