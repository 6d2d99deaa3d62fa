"""Texts end where turns were taught to end, in the run that taught it and in every later one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lightning
from lora_lightning import CausalLM
from lora_lightning.errors import CheckpointError
from lora_lightning.runs.run import find_run
from lora_lightning.tasks.stop_tokens import saved_end_tokens, stop_line, until_end
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.taught_lm import (
    ANSWER,
    OTHER_EOS,
    QUESTION,
    TURN_ENDS,
    base_with_other_eos,
    taught,
)
from tests.helpers.tiny_lm import STYLES, tiny_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    return taught(folder, base_with_other_eos(folder / "base", "chatml"))


class Counts:
    """A streamer that counts tokens."""

    def __init__(self) -> None:
        self.tokens = -1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1

    def end(self) -> None:
        pass


def loaded(run: Path) -> Any:
    module: Any = lora_lightning.load_from_checkpoint(CausalLM, find_run(run).checkpoint)
    return module.eval()


def prompt_of(tokenizer: Any) -> torch.Tensor:
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def check_stops(module: Any, style: str) -> None:
    ids, tokenizer = prompt_of(module.tokenizer), module.tokenizer
    assert tokenizer.convert_ids_to_tokens(module.end_tokens) == [TURN_ENDS[style]]
    counts = Counts()
    assert module.generate(ids, streamer=counts) == [ANSWER]
    assert counts.tokens == len(tokenizer(ANSWER, add_special_tokens=False)["input_ids"]) + 1


def test_a_loaded_run_stops(run: Path) -> None:
    check_stops(loaded(run), "chatml")


def test_without_it_the_text_runs_on(run: Path) -> None:
    module, counts = loaded(run), Counts()
    module.end_tokens = []
    [text] = module.generate(prompt_of(module.tokenizer), streamer=counts)
    assert counts.tokens == module.max_new_tokens == 24
    assert text.startswith(ANSWER)
    assert text != ANSWER


def test_what_the_user_names_has_the_say(run: Path) -> None:
    module = loaded(run)
    ids, counts = prompt_of(module.tokenizer), Counts()
    module.generation = {"eos_token_id": module.tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    module.generate(ids, streamer=counts)
    assert counts.tokens == 24
    first = module.tokenizer(ANSWER, add_special_tokens=False)["input_ids"][0]
    # ... and what it names is part of the text, as in transformers
    assert module.generate(ids, eos_token_id=first) == [module.tokenizer.decode([first])]


def test_an_end_that_is_no_special_token_is_not_shown(run: Path) -> None:
    module = loaded(run)
    last = module.tokenizer(ANSWER, add_special_tokens=False)["input_ids"][-1]
    module.end_tokens = [last]
    assert module.generate(prompt_of(module.tokenizer)) == [ANSWER[:-1]]


def test_the_checkpoint_keeps_it(run: Path) -> None:
    saved = torch.load(find_run(run).checkpoint, weights_only=True)
    assert saved["end_tokens"] == tiny_tokenizer("chatml").convert_tokens_to_ids(["<|im_end|>"])
    assert saved["prompting"] == {
        "kinds": ["Chat"],
        "format": "messages",
        "chat_template": None,
        "chat_template_kwargs": {},
    }


def test_older_checkpoints_hold_none(run: Path) -> None:
    saved = torch.load(find_run(run).checkpoint, weights_only=True)
    del saved["end_tokens"], saved["prompting"]
    module = CausalLM(str(run.parent / "base"))
    module.on_load_checkpoint(saved)
    assert module.end_tokens == []
    assert module.prompting == {}


@pytest.mark.parametrize("found", [7, [-1], ["<|im_end|>"], [True], [1.0], None])
def test_damaged_entries(found: Any) -> None:
    with pytest.raises(CheckpointError, match="'end_tokens' holds no token ids"):
        saved_end_tokens({"end_tokens": found})


def test_predict_stops_and_says_it(run: Path, tmp_path: Path, caplog: Any) -> None:
    module = loaded(run)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": QUESTION}]}))
    data = lora_lightning.TextDataModule(predict=str(prompts))
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.propagate = True
    try:
        with caplog.at_level(logging.INFO):
            assert make_trainer(tmp_path).predict(module, data) == [[ANSWER]]
    finally:
        logger.propagate = False
    assert any("stops at '<|im_end|>'" in line for line in caplog.messages)


def test_training_on_keeps_what_was_taught_before(run: Path, tmp_path: Path) -> None:
    """A run that goes on with other data has learned both."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    checkpoint = find_run(folder).checkpoint
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Once upon a time there was a girl."}\n' * 8)
    module = CausalLM(str(run.parent / "base"), learning_rate=2e-2)
    data = lora_lightning.TextDataModule(str(rows), val=0, max_length=64, batch_size=8)
    trainer = make_trainer(tmp_path, lora_lightning.LoraCallback(r=8), max_epochs=41)
    trainer.fit(module, data, ckpt_path=str(checkpoint))
    names = module.tokenizer.convert_ids_to_tokens(module.end_tokens)
    assert sorted(names) == ["<|endoftext|>", "<|im_end|>"]
    assert module.prompting["kinds"] == ["Document"]


@pytest.mark.slow
@pytest.mark.parametrize("style", [style for style in STYLES if style != "chatml"])
def test_other_templates(tmp_path: Path, style: str) -> None:
    check_stops(loaded(taught(tmp_path, base_with_other_eos(tmp_path / "base", style))), style)


def test_small_parts() -> None:
    tokenizer = tiny_tokenizer("chatml")
    assert until_end([1, 2, 3, 2], {2, 9}) == [1]
    assert until_end([1, 2], set()) == [1, 2]
    assert stop_line(tokenizer, [tokenizer.eos_token_id]) is None
    assert stop_line(tokenizer, []) is None
    tokenizer.eos_token = OTHER_EOS["chatml"]
    line = stop_line(tokenizer, tokenizer.convert_tokens_to_ids(["<|im_end|>"]))
    assert line is not None
    assert "'<|im_end|>'" in line
    assert "'<|endoftext|>'" in line
