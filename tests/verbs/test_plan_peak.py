"""`plan`: its peak lies near what a run of the gallery's configs is measured to take."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_lightning import Plan
from lora_lightning.verbs.plan.live_bytes import LiveBytes
from lora_lightning.verbs.plan.run_length import RunLength
from tests.helpers.command import run_command
from tests.helpers.memory import MeasuredPeak
from tests.helpers.paths import ROOT
from tests.helpers.tiny_lm import PLAIN_WORDS, tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of torch's profiler
]
SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6}


def words(count: int) -> str:
    return " ".join(random.Random(count).choices(PLAIN_WORDS, k=count))


def causal(place: Path) -> str:
    tiny_llama(place / "model", max_position_embeddings=2048, **SIZES)
    rows = [{"prompt": words(150 + n), "completion": f" {words(2000)}"} for n in range(40)]
    return "\n".join(map(json.dumps, rows))


def of_many_lengths(place: Path) -> str:
    tiny_llama(place / "model", max_position_embeddings=2048, **SIZES)
    lengths = [(10 + 3 * (7 * n % 40), 20 + 4 * (11 * n % 40)) for n in range(40)]
    rows = [{"prompt": words(a), "completion": f" {words(b)}"} for a, b in lengths]
    return "\n".join(map(json.dumps, rows))


def chats(place: Path) -> str:
    tiny_llama(place / "model", "chatml", max_position_embeddings=2048, **SIZES)
    turns = [
        [("user", words(100 + n)), ("assistant", words(200 + n))]
        for n in range(90)
    ]  # fmt: skip
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in turns]
    return "\n".join(map(json.dumps, rows))


def pairs(place: Path) -> str:
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(place / "model")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    ids = {"decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = T5Config(vocab_size=len(tokenizer), **sizes, **ids)
    T5ForConditionalGeneration(config).save_pretrained(place / "model")
    rows = [{"prompt": words(700 + n), "completion": words(600 + n)} for n in range(40)]
    return "\n".join(map(json.dumps, rows))


PASSING = {"loss head", "backward"}
# Of each config: its data, how many batches it accumulates, and parts without which the figure is
# another.
GALLERY: dict[str, tuple[Callable[[Path], str], int, set[str]]] = {
    "sft": (causal, 4, PASSING),
    "chat": (chats, 4, PASSING),
    "qlora": (causal, 8, PASSING),
    "seq2seq": (pairs, 1, {"activations"}),
}


class Tried:
    """A config of the gallery on data made up for it, measured and planned."""

    def __init__(self, config: str, make: Callable[[Path], str], place: Path, call: Any) -> None:
        rows = make(place)
        (place / "rows.jsonl").write_text(rows)
        (place / "val.jsonl").write_text("\n".join(rows.split("\n")[:2]))
        given = {"model.model": "model", "data.train": "rows.jsonl", "data.val": "val.jsonl"}
        given["trainer.accelerator"] = "cpu"
        self._options = ["--config", str(ROOT / f"configs/{config}.yaml"), *_words("", given)]
        self._call = call

    def measured(self, first: int, batches: int) -> MeasuredPeak:
        """A real run; measured from its batch `first` on."""
        few = {
            "limit_train_batches": batches,
            "max_epochs": 1,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "val_check_interval": 1.0,
            "callbacks+": "tests.helpers.memory.MeasuredPeak",
            "callbacks.first": first,
        }
        run = [*_words("trainer.", few), "--compare_with_base", "false"]
        self._call("fit", *self._options, *run)
        assert MeasuredPeak.last is not None
        return MeasuredPeak.last

    def planned(self, monkeypatch: pytest.MonkeyPatch) -> Plan:
        found: list[Plan] = []
        monkeypatch.setattr(Plan, "show", lambda plan: found.append(plan))
        self._call("plan", *self._options)
        (planned,) = found
        return planned


def _words(prefix: str, options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{prefix}{key}", str(value))]


@pytest.mark.parametrize("name", GALLERY)
def test_peak_is_near_what_is_measured(
    name: str, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    make, window, parts = GALLERY[name]
    tried = Tried(name, make, tmp_path, partial(run_command, tmp_path, monkeypatch, capfd))
    measured = tried.measured(window, window + 1)
    planned = tried.planned(monkeypatch)
    error = planned.peak_bytes / measured.peak - 1
    with capfd.disabled():
        print(f"\n{name}: planned {planned.peak_bytes:,}, measured {measured.peak:,}, {error:+.2%}")
    assert planned.optimizer_bytes == measured.optimizer
    assert planned.base_bytes + planned.adapter_bytes == pytest.approx(measured.resident, rel=0.02)
    assert abs(error) < 0.15

    count = LiveBytes._count
    with monkeypatch.context() as broken:
        broken.setattr(LiveBytes, "_count", lambda live, t, of: of in parts or count(live, t, of))
        without = tried.planned(monkeypatch).peak_bytes / measured.peak - 1
    assert without < -0.15, f"a plan without {parts} is off by {without:+.2%} only"
    if make is causal:  # where prompts are half of the data
        monkeypatch.setattr(RunLength, "most_learned", lambda *_: None)
        assert tried.planned(monkeypatch).peak_bytes / measured.peak - 1 > 0.15


def test_no_batch_of_rows_of_many_lengths_takes_more(
    tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    call = partial(run_command, tmp_path, monkeypatch, capfd)
    tried = Tried("sft", of_many_lengths, tmp_path, call)
    measured, planned = tried.measured(4, 10), tried.planned(monkeypatch)
    error = planned.peak_bytes / measured.peak - 1
    with capfd.disabled():
        print(f"\nragged: planned {planned.peak_bytes:,}, measured {measured.peak:,}, {error:+.2%}")
    assert -0.02 < error < 0.5
