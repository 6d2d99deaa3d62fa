"""TextDataModule: what is in its batches, in which order, and what it refuses."""

from __future__ import annotations

import json
import logging
import pickle
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from transformers import BartConfig

from lora_lightning import LoraCallback, TextDataModule
from lora_lightning.data.batches.collate import PackRows
from lora_lightning.data.batches.epoch_sampler import EpochSampler
from lora_lightning.data.batches.packing import check_packing
from lora_lightning.data.encoding.for_model import encoding_for
from lora_lightning.errors import ConfigError, LoraError, RecordError
from lora_lightning.tasks import CausalLM
from lora_lightning.utilities.constants import IGNORE_INDEX
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.messages import message_of
from tests.helpers.tiny_lm import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("model"), hidden_size=16, num_hidden_layers=1))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("chat"), template="chatml"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question(number: int) -> dict[str, str]:
    return {"prompt": f"What is {number}? " * (1 + number % 7), "completion": f"{number}."}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    rows = [question(number) for number in range(200)]
    return write(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


def data_of(model: str, *stages: str, **options: Any) -> TextDataModule:
    defaults = {"tokenizer": model, "max_length": 64, "batch_size": 4, "shuffle_buffer": 32}
    data = TextDataModule(**{**defaults, **options})
    for stage in stages:
        data.setup(stage)
    return data


def message(model: str, stage: str, error_type: type[LoraError] = ConfigError, **options: Any):
    return message_of(error_type, data_of, model, stage, **options)


def learned(batches: Any) -> Counter[tuple[int, ...]]:
    """The learned tokens of each example, each with what comes before them."""
    found: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        positions = batch.get("position_ids")
        for row, ids in enumerate(batch["input_ids"].tolist()):
            labels = batch["labels"][row].tolist()
            places = range(len(ids)) if positions is None else positions[row].tolist()
            starts = [i for i, place in enumerate(places) if place == 0] + [len(ids)]
            for start, end in pairwise(starts):
                length = max(
                    (i for i in range(start, end) if labels[i] != IGNORE_INDEX), default=None
                )
                if length is not None:
                    found[tuple(ids[start : length + 1])] += 1
    return found


MODES = {
    "map": {},
    "packed": {"packing": True},
    "streamed": {"streaming": True},
    "streamed, packed, workers": {"streaming": True, "packing": True, "num_workers": 2},
}


@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_every_mode_serves_the_same_examples(mode, model, train):
    plain = data_of(model, "fit", train=train)
    other = data_of(model, "fit", train=train, **MODES[mode])
    examples = learned(plain.train_dataloader())
    held_out = learned(plain.val_dataloader())
    assert learned(other.train_dataloader()) == examples
    assert learned(other.val_dataloader()) == held_out
    assert sum(examples.values()) + sum(held_out.values()) == 200
    assert set(examples.values()) == {1}
    assert not examples.keys() & held_out.keys()
    assert sum(held_out.values()) > 5


def test_the_comparison_of_modes_can_fail(model, train):
    """A share of the rows, as one of two processes has it, is not the whole."""
    data = data_of(model, "fit", train=train, **MODES["streamed"])
    examples = learned(data.train_dataloader())
    data.prepared("train").processes = 2
    assert sum(learned(data.train_dataloader()).values()) < 0.7 * sum(examples.values())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_order_follows_seed_and_epoch(mode, model, train):
    def epochs(seed: int) -> list[list[Any]]:
        seed_everything(seed, verbose=False)
        loader = data_of(model, "fit", train=train, **MODES[mode]).train_dataloader()
        return [[batch["input_ids"].tolist() for batch in loader] for _ in range(2)]

    first = epochs(1)
    assert first == epochs(1)
    assert first[0] != first[1]
    assert first[0] != epochs(2)[0]


def test_batches_hold_examples_of_about_equal_length(model, train):
    for options in ({}, {"streaming": True, "shuffle_buffer": 200}):
        loader = data_of(model, "fit", train=train, **options).train_dataloader()
        masks = [batch["attention_mask"] for batch in loader]
        assert sum(int(m.sum()) for m in masks) > 0.9 * sum(m.numel() for m in masks)


def test_packed_batches(model, train, caplog):
    with caplog.at_level(logging.INFO):
        data = data_of(model, "fit", train=train, packing=True, val=0)
    batches = list(data.train_dataloader())
    assert {tuple(b["input_ids"].shape[1:]) for b in batches} == {(64,)}
    assert set(batches[0]) == {"input_ids", "labels", "position_ids"}
    tokens = sum(data.prepared("train").store.lengths)
    rows = sum(len(b["input_ids"]) for b in batches)
    assert tokens > 0.95 * 64 * rows
    line = f"packed into {rows} rows of 64 tokens, {100 * tokens / 64 / rows:.0f} % full (data.packing)"
    assert line in caplog.text


def test_what_is_said_of_the_data(model, train, caplog):
    with caplog.at_level(logging.INFO):
        data_of(model, "fit", train=train, val=train, max_length=20, untrainable="drop")
        data_of(model, "fit", train=train, streaming=True, val=0)
    assert re.search(r"train: \d+ examples, [\d,]+ tokens, \d+ % of them learned", caplog.text)
    assert "cut to 20 tokens (data.max_length)" in caplog.text
    assert "train: 32 examples" in caplog.text
    assert "of the first 32 rows; all are read while training" in caplog.text


def test_a_stream_reads_as_it_goes(model, train, tmp_path):
    """A mistake far down is met when it is reached, with its line."""
    rows = [*map(json.dumps, map(question, range(60))), '{"prompt": "x"}']
    path = tmp_path / "late.jsonl"
    path.write_text("\n".join(rows))
    loader = data_of(model, "fit", train=str(path), streaming=True, val=0).train_dataloader()
    with pytest.raises(RecordError, match=r"late\.jsonl, line 61: no key 'completion'"):
        list(loader)


@pytest.mark.parametrize("val", [0, 0.1])
def test_the_format_of_a_stream_is_said_once(val, model, tmp_path, caplog):
    rows = [{**question(number), "source": "x"} for number in range(60)]
    path = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.INFO):
        list(data_of(model, "fit", train=path, val=val, streaming=True).train_dataloader())
    line = "the format is 'prompt-completion' (data.format); keys not read: source"
    assert caplog.text.count(line) == 1


def test_a_stream_that_gives_no_batch_is_an_error(model, tmp_path):
    """Not a Trainer that waits for its steps for ever."""
    path = write(tmp_path / "long.jsonl", [{"prompt": "What? " * 80, "completion": "x"}] * 5)
    for lora in ([], [LoraCallback()]):
        data = TextDataModule(train=path, val=0, max_length=64, streaming=True, untrainable="drop")
        with pytest.raises(RecordError, match="gave no batch, at least on one of 1 processes"):
            make_trainer(tmp_path, *lora, max_steps=2).fit(CausalLM(model), data)


def test_the_state_of_a_stream_is_three_numbers(model, train):
    data = data_of(model, "fit", train=train, streaming=True)
    data.train_dataloader()
    stream = data.prepared("train")
    straight = iter(stream)
    for _ in range(70):
        next(straight)
    state = straight.state_dict()
    assert {key: type(value) for key, value in state.items()} == dict.fromkeys(
        ("seed", "block", "given"), int
    )
    assert state["block"] == 2
    resumed = iter(pickle.loads(pickle.dumps(stream)))  # as a worker of another process has it
    resumed.load_state_dict(state)
    rest, same = [[r[0].input_ids.tolist() for r in p] for p in (straight, resumed)]
    assert rest == same != []


def test_processes_and_workers_share_out_the_rows_of_a_stream(model, train):
    data = data_of(model, "fit", train=train, streaming=True, val=0)
    stream = data.prepared("train")
    shares = [
        [tuple(row[0].input_ids.tolist()) for row in replace(stream, rank=rank, processes=3)]
        for rank in range(3)
    ]
    assert len({ids for share in shares for ids in share}) == sum(map(len, shares)) == 200


def test_prompts_are_padded_where_the_answer_does_not_go(model, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "What is two?"}, {"prompt": "What?"}])
    data = data_of(model, "predict", predict=prompts)
    (batch,) = data.predict_dataloader()
    assert batch["attention_mask"].tolist()[1][0] == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    texts = data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == ["What is two?", "What?"]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_samples_to_show(model, train):
    data = data_of(model, train=train)
    assert [sample.prompt[:7] for sample in data.sample_prompts(2)] == ["What is"] * 2
    assert data_of(model, train=train, val=0).sample_prompts(1) == []
    assert data_of(model, test=train).sample_prompts(1) == []


def test_alpaca_rows_are_chats_where_there_is_a_template(model, chat_model, tmp_path):
    rows = [{"instruction": "What is two?", "input": "", "output": "It is five."}]
    path = write(tmp_path / "a.jsonl", rows)
    texts = []
    for name in (model, chat_model):
        data = data_of(name, "test", test=path, max_length=200)
        (batch,) = data.test_dataloader()
        texts.append(data.tokenizer.decode(batch["input_ids"][0]))
    assert "### Instruction:\nWhat is two?" in texts[0]
    assert "<|im_start|>user\nWhat is two?<|im_end|>\n<|im_start|>assistant\nIt is" in texts[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_predicting_answers_in_order(workers, model, tmp_path):
    rows = [{"prompt": f"What is {n}?"} for n in range(6)]
    prompts = write(tmp_path / "p.jsonl", rows)
    data = TextDataModule(predict=prompts, batch_size=4, num_workers=workers)
    module = CausalLM(model, max_new_tokens=3)
    answers = make_trainer(tmp_path).predict(module, data)
    assert [len(batch) for batch in answers] == [4, 2]
    alone = []
    for row in rows:
        ids = torch.tensor([data.tokenizer(row["prompt"])["input_ids"]])
        alone += module.generate(ids)
    assert [text for batch in answers for text in batch] == alone


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_a_few_batches(model, train, tmp_path):
    data = TextDataModule(train=train, max_length=64, batch_size=4)
    assert fit(tmp_path, CausalLM(model), data, overfit_batches=2, max_steps=5).global_step == 5


# -- encoder-decoders ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def test_pairs_of_an_encoder_decoder(t5, train):
    data = data_of(t5, "fit", "predict", train=train, predict=train, max_target_length=5)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["labels"].shape[0] == 4
    assert batch["labels"].shape[1] <= 5 < batch["input_ids"].shape[1]
    prompts = next(iter(data.predict_dataloader()))
    assert prompts["attention_mask"][:, 0].tolist() == [1, 1, 1, 1]


def test_a_prompt_of_nothing_cannot_be_answered(model, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "What?"}, {"prompt": ""}])
    text = message(model, "predict", RecordError, predict=prompts)
    assert text.startswith(f"{prompts}, line 2: the prompt is empty")


def test_targets_have_no_more_tokens_than_the_decoder_has_positions():
    config = BartConfig(max_position_embeddings=64)
    names = ("chat_template", "chat_template_kwargs", "train_on_prompt", "max_length")
    with pytest.raises(
        ConfigError, match=r"max_target_length=65 is .* \(data\.max_target_length\)"
    ):
        encoding_for(None, config, {**dict.fromkeys(names), "max_target_length": 65})


def test_options_that_do_not_suit_the_model(model, t5, train):
    assert message(t5, "fit", train=train, packing=True) == (
        f"packing: {t5!r} is an encoder-decoder, whose examples cannot share a row. Leave it out: "
        "batches hold examples of about equal length. (data.packing)"
    )
    assert message(t5, "fit", train=train, train_on_prompt=True) == (
        "train_on_prompt has no meaning for an encoder-decoder. Leave it out. "
        "(data.train_on_prompt)"
    )
    assert message(model, "fit", train=train, max_target_length=5) == (
        "max_target_length has no meaning for a causal LM. Leave it out. (data.max_target_length)"
    )


# -- what is refused -------------------------------------------------------------------------------


def test_max_length_and_the_positions_of_the_model(model, train):
    assert message(model, "fit", train=train, max_length=513) == (
        "max_length=513 is more than the 512 positions that the model has "
        "(max_position_embeddings in its config.json). (data.max_length)"
    )
    assert data_of(model, max_length=None).encoder.max_length == 512


def test_a_buffer_of_no_rows():
    with pytest.raises(ConfigError, match=r"at least 1 row, found 0\. \(data\.shuffle_buffer\)"):
        TextDataModule(shuffle_buffer=0)


def test_an_unknown_format_is_met_at_once():
    with pytest.raises(ConfigError, match=r"Did you mean 'alpaca'\?.*\(data\.format\)"):
        TextDataModule(format="alpacca")


def test_nothing_to_train_on(model, tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    for streaming in (False, True):
        text = message(model, "fit", RecordError, train=empty, val=0, streaming=streaming)
        assert text == f"{empty}: no rows; it is empty. (data.train)"
    long = write(tmp_path / "long.jsonl", [{"prompt": "What is " * 99, "completion": "two"}])
    text = message(model, "fit", RecordError, train=long, val=0, untrainable="drop")
    assert "there is nothing left. (data.train)" in text


def test_a_stream_of_which_nothing_is_held_out(model, tmp_path):
    few = write(tmp_path / "few.jsonl", [question(1), question(2)])
    assert message(model, "fit", train=few, val=0.001, streaming=True) == (
        "val=0.001 holds out none of the training data. Change it, or name a file. (data.val)"
    )


def test_streaming_without_torchdata(model, train, monkeypatch):
    monkeypatch.delitem(sys.modules, "lora_lightning.data.batches.text_loader", raising=False)
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    data = data_of(model, "fit", train=train, streaming=True)
    with pytest.raises(ConfigError, match=r"pip install .*\[data\].*\(data\.streaming\)"):
        data.train_dataloader()
    assert len(data_of(model, "fit", train=train).train_dataloader()) > 10


# -- packing, asked of the network -----------------------------------------------------------------


def opt(folder: Path) -> str:
    """Its attention does not mind positions."""
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, word_embed_proj_dim=16, ffn_dim=32,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    return str(folder)


def fit(folder: Path, module: LightningModule, data: TextDataModule, **options: Any) -> Any:
    callbacks = [LoraCallback(r=2)] if isinstance(module, CausalLM) else []
    trainer = make_trainer(folder, *callbacks, **{"max_steps": 2, "max_epochs": -1, **options})
    trainer.fit(module, data)
    return trainer


def test_a_network_that_would_mix_packed_examples_is_refused(tmp_path, train):
    name = opt(tmp_path / "opt")
    data = {"train": train, "max_length": 64, "batch_size": 4}
    with pytest.raises(ConfigError) as error:
        fit(tmp_path, CausalLM(name), TextDataModule(packing=True, **data))
    assert str(error.value) == (
        "packing: OPTForCausalLM (attention: sdpa) does not keep packed examples apart: what a "
        "token says depends on the example before it. Set packing: false, where batches hold "
        "examples of about equal length, or use another model or attention "
        "(model.attn_implementation). (data.packing)"
    )
    assert fit(tmp_path, CausalLM(name), TextDataModule(**data)).global_step == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_asking_leaves_the_network_as_it_is(precision, model, train, tmp_path):
    data = TextDataModule(train=train, max_length=64, batch_size=4, packing=True)
    trainer = fit(tmp_path, CausalLM(model), data, precision=precision)
    module = trainer.lightning_module
    module.train()
    module.network.model.norm.eval()
    modes = [m.training for m in module.modules()]
    before = torch.get_rng_state()
    check_packing(trainer)
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


class NoNetwork(LightningModule):
    def __init__(self, model: str) -> None:
        super().__init__()
        self.model_name = model
        self.embedding = torch.nn.Embedding(1000, 1)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.embedding(batch["input_ids"]).mean()

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_who_brings_another_network_is_told(model, train, tmp_path):
    data = TextDataModule(train=train, max_length=64, batch_size=4, packing=True)
    with pytest.warns(UserWarning, match="there is no Hugging Face network in NoNetwork to ask"):
        fit(tmp_path, NoNetwork(model), data)


def test_flash_attention_is_given_one_row(model, train, tmp_path):
    data = TextDataModule(train=train, max_length=64, batch_size=4, packing=True)
    trainer = fit(tmp_path, CausalLM(model), data)
    assert data.train_dataloader().collate_fn == PackRows(64, False, data.tokenizer.pad_token_id)
    trainer.lightning_module.network.config._attn_implementation = "flash_attention_2"
    collate = data.train_dataloader().collate_fn
    assert collate.flat
    rows = data.prepared("train")
    assert collate([rows[0], rows[1]])["input_ids"].shape[0] == 1


# -- the order over processes ----------------------------------------------------------------------


@pytest.mark.parametrize("group", [True, False])
def test_processes_have_together_what_one_has(group):
    lengths = torch.randint(1, 50, (43,)).tolist()
    alone = EpochSampler(lengths, 8, shuffle=True, group=group, seed=5)
    shares = [
        EpochSampler(lengths, 4, shuffle=True, group=group, seed=5, num_replicas=2, rank=rank)
        for rank in range(2)
    ]
    for epoch in (0, 1):
        for sampler in (alone, *shares):
            sampler.set_epoch(epoch)
        whole, parts = list(alone), [list(share) for share in shares]
        assert sorted(whole) == list(range(43))
        assert [len(part) for part in parts] == [len(shares[0])] * 2 == [22, 22]
        for step in range(6):
            batch = {i for part in parts for i in part[4 * step : 4 * step + 4]}
            assert batch - {43} == set(whole[8 * step : 8 * step + 8])
    assert sorted(i for part in parts for i in part) == list(range(44))
