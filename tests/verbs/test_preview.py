"""`preview` of texts: each token once, what is learned is marked, what is counted is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lora_lightning.data.text import TextDataModule
from lora_lightning.errors import ConfigError, RecordError
from lora_lightning.tasks.causal_lm import CausalLM
from lora_lightning.training import messages
from lora_lightning.verbs.preview import texts
from lora_lightning.verbs.preview.preview import preview
from lora_lightning.verbs.preview.tokens import TokenText, pieces_of
from tests.helpers.messages import message_of
from tests.helpers.tiny_lm import tiny_llama, tiny_tokenizer

CHATS = [
    [("user", "How are you?"), ("assistant", "I am fine, thank you.")],
    [("user", "One \x1b[31mtwo"), ("assistant", "three 😀 ⟦four⟧"), ("user", "and"), ("assistant", "five")],
    [("system", "Answer"), ("user", "What is the capital?"), ("assistant", "Paris " * 60)],
    [("user", "Hello " * 80), ("assistant", "no")],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    tiny_llama(folder / "base", "chatml")
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in CHATS]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "d.txt").write_text("One two three\nThe quick brown fox\n" + "Hello " * 60)
    return folder


def data_of(folder: Path, train: str = "c.jsonl", **options: Any) -> TextDataModule:
    options = {"val": 0.0, "max_length": 64, "untrainable": "drop", **options}
    return TextDataModule(str(folder / train), **options)


def previewed(folder: Path, train: str = "c.jsonl", rows: int = 9, **options: Any) -> Any:
    return preview(data_of(folder, train, **options), CausalLM(str(folder / "base")), rows)


def truth(chat: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """ChatML by hand: a turn of the assistant and its end are learned, all else is not."""
    parts: list[tuple[str, bool]] = []
    for role, content in chat:
        if role == "assistant":
            parts += [
                (f"<|im_start|>{role}\n", False),
                (f"{content}<|im_end|>", True),
                ("\n", False),
            ]
        else:
            parts += [(f"<|im_start|>{role}\n{content}<|im_end|>\n", False)]
    joined: list[tuple[str, bool]] = []
    for text, learned in parts[:-1]:  # what follows the last turn is left out
        if joined and joined[-1][1] == learned:
            text = joined.pop()[0] + text
        joined.append((text, learned))
    return joined


def said(text: TokenText) -> list[tuple[str, bool]]:
    return [(piece.text, piece.learned) for part in text.documents for piece in part]


def check_against_the_truth(folder: Path) -> None:
    tokenizer = tiny_tokenizer("chatml")
    shown = previewed(folder).texts
    assert len(shown) == 3  # of the last one nothing would be learned
    for text, chat in zip(shown[:2], CHATS, strict=False):
        assert said(text) == truth(chat)
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part, _ in truth(chat)]
        (pieces,) = text.documents
        assert [piece.tokens for piece in pieces] == [len(part) for part in ids]  # each once
        learned = sum(len(part) for part, (_, yes) in zip(ids, truth(chat), strict=True) if yes)
        total = sum(map(len, ids))
        assert text.title.endswith(f"{total} tokens, {learned} of them learned")


def test_what_is_learned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_the_truth(folder)

    def shifted(tokenizer: Any, ids: Any, learned: list[bool], most: int) -> Any:
        return pieces_of(tokenizer, ids, [False, *learned[:-1]], most)

    monkeypatch.setattr(texts, "pieces_of", shifted)
    with pytest.raises(AssertionError):
        check_against_the_truth(folder)


def test_it_is_what_the_loader_serves(folder: Path) -> None:
    data = data_of(folder, batch_size=3)
    shown = preview(data, CausalLM(str(folder / "base")), 9).texts
    assert data.trainer is None
    (batch,) = data.train_dataloader()
    served = set()
    for ids, labels, mask in zip(*map(batch.get, ("input_ids", "labels", "attention_mask")), strict=True):  # fmt: skip
        kept = [i for i in range(len(ids)) if mask[i]]
        learned = data.tokenizer.decode([int(ids[i]) for i in kept if labels[i] != -100])
        served.add((data.tokenizer.decode(ids[kept]), learned))
    assert served == {
        ("".join(t for t, _ in said(s)), "".join(t for t, yes in said(s) if yes)) for s in shown
    }


def test_counts_are_those_of_training(folder: Path) -> None:
    found = previewed(folder)
    tokenizer = tiny_tokenizer("chatml")
    learned: list[bool] = []
    lengths = []
    for chat in CHATS[:3]:
        parts = [
            (tokenizer(t, add_special_tokens=False)["input_ids"], yes) for t, yes in truth(chat)
        ]
        each = [yes for ids, yes in parts for _ in ids][:64]
        lengths.append(len(each))
        learned += each
    share = 100 * sum(learned) / len(learned)
    assert found.told == {
        "train": f"train: 3 examples, {len(learned)} tokens, {share:.0f} % of them learned; 1 cut "
        "to 64 tokens (data.max_length); 1 dropped, nothing of them would be learned "
        "(data.untrainable)"
    }
    assert lengths[2] == 64
    assert ", cut to 64 tokens (data.max_length)" in found.texts[2].title
    text = str(found)
    assert "3 of 4 turns and answers end in '<|im_end|>', which is learned" in text
    assert "1 of 4 are cut before they end (data.max_length)" in text
    assert "the format is 'messages' (data.format)" in text
    assert found.told["train"] in text
    assert f"shortest {min(lengths)}, median {sorted(lengths)[1]}, 95 % up to" in text
    bars = {line.split()[0]: line.split()[-1] for line in text.splitlines() if "█" in line}
    of = [range(int(bar.split("-")[0]), int(bar.split("-")[-1]) + 1) for bar in bars]
    assert [sum(n in span for n in lengths) for span in of] == [int(n) for n in bars.values()]
    assert sum(int(n) for n in bars.values()) == 3


def test_nothing_of_the_data_is_obeyed(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    found = previewed(folder)
    text = str(found)
    assert r"One \x1b[31mtwo<|im_end|>" in text
    assert r"⟦three 😀 \u27e6four\u27e7<|im_end|>⟧" in text
    page = found._repr_html_()
    assert page.startswith("<pre")
    assert "\x1b" not in text + page
    assert r"One \x1b[31mtwo&lt;|im_end|&gt;" in page
    assert "background-color: #008000" in page
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    found.show()
    shown = capsys.readouterr().out
    assert r"One \x1b[31mtwo" in shown
    assert "\x1b[31m" not in shown
    assert "\x1b[30;42mI am fine, thank you.<|im_end|>\x1b[0m" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    found.show()
    assert "⟦I am fine, thank you.<|im_end|>⟧" in capsys.readouterr().out
    assert repr(found) == text == messages.as_text(found)


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "prefix", "gpt2"])
@pytest.mark.parametrize("most", [1000, 7])
def test_pieces_are_the_text(style: str, most: int) -> None:
    manner = {"prefix": "sentencepiece-prefix", "gpt2": "gpt2"}.get(style)
    tokenizer = tiny_tokenizer(manner=manner) if manner else tiny_tokenizer(style)
    generator = torch.Generator().manual_seed(0)
    for text in ("Hello world! 😀 zażółć 日本 👩‍👩‍👧", " two  blanks\n\n\tand", "�x� €", "a"):
        ids = tokenizer(text)["input_ids"]
        for _ in range(20):
            learned = torch.randint(0, 2, (len(ids),), generator=generator).bool().tolist()
            pieces = pieces_of(tokenizer, ids, learned, most)
            whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert "".join(piece.text for piece in pieces) == whole
            assert sum(piece.tokens for piece in pieces) == len(ids)
            spread = [piece.learned for piece in pieces for _ in range(piece.tokens)]
            assert spread == learned
            left_out = sum(piece.tokens for piece in pieces if piece.left_out)
            assert left_out == max(len(ids) - most, 0)


def test_long_texts_are_shown_in_part(folder: Path) -> None:
    module = CausalLM(str(folder / "base"))
    found = preview(data_of(folder, max_length=200), module, rows=4, tokens=20)
    total = sum(piece.tokens for piece in found.texts[3].documents[0])
    assert f"[... {total - 20} tokens are not shown ...]" in str(found)
    (pieces,) = found.texts[3].documents
    assert sum(piece.tokens for piece in pieces if not piece.left_out) == 20
    assert str(found).count("⟦no<|im_end|>⟧") == 1  # the end is shown, where answers are


def test_packed_rows_show_their_documents(folder: Path) -> None:
    data = data_of(folder, packing=True, batch_size=9, max_length=80)
    found = preview(data, CausalLM(str(folder / "base")), 9)
    assert [len(text.documents) for text in found.texts] == [1, 2]
    short = sorted(
        (truth(chat) for chat in CHATS[:2]), key=lambda t: -len("".join(x for x, _ in t))
    )
    assert said(found.texts[1]) == [*short[0], *short[1]]
    first, second = (sum(p.tokens for p in part) for part in found.texts[1].documents)
    assert f"-- document 2, {second} tokens" in str(found)
    assert "packed into 2 rows of 80 tokens" in found.told["train"]
    (batch,) = data.train_dataloader()
    begins = [row.nonzero().flatten().tolist() for row in batch["position_ids"] == 0]
    assert [0, first, first + second] in begins  # there the loader's begin, and its filling


@pytest.mark.parametrize(("train", "streaming"), [("c.jsonl", True), ("d.txt", False)])
def test_streams_and_documents(folder: Path, train: str, streaming: bool) -> None:
    if streaming:
        pytest.importorskip("torchdata", reason="streaming needs torchdata (extra `data`)")
    found = previewed(folder, train, rows=2, streaming=streaming)
    if streaming:
        assert "of the first 4 rows; all are read while training" in found.told["train"]
        assert said(found.texts[1]) == truth(CHATS[1])
        packed = previewed(folder, train, streaming=True, packing=True)
        shown = [piece for text in packed.texts for piece in said(text)]
        assert {*truth(CHATS[0]), *truth(CHATS[1])} <= {*shown}
    else:
        assert said(found.texts[0]) == [("One", False), (" two three<|im_end|>", True)]
        assert "2 of 3 turns and answers end in '<|im_end|>'" in str(found)


def test_a_template_without_ends_is_told(folder: Path) -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    text = str(previewed(folder, chat_template=plain, max_length=200))
    assert "5 of 5 turns and answers end in no special token: the model does not learn to" in text


def test_prompts_and_held_out_rows(folder: Path) -> None:
    path = str(folder / "c.jsonl")
    data = TextDataModule(predict=path, tokenizer=str(folder / "base"))
    found = preview(data, rows=1)
    assert said(found.texts[0]) == [(truth(CHATS[0])[0][0], False)]
    assert found.told == {"predict": "predict: 4 prompts"}
    held_out = previewed(folder, "c.jsonl", val=path, test=path)
    assert [*held_out.told] == ["train", "val", "test"]


def test_targets_of_an_encoder_decoder(tmp_path: Path) -> None:
    from transformers import T5Config

    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    T5Config(vocab_size=640, decoder_start_token_id=0).save_pretrained(tmp_path / "t5")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Hello", "completion": "world!"}))
    found = preview(
        TextDataModule(str(tmp_path / "a.jsonl"), val=0, tokenizer=str(tmp_path / "t5"))
    )
    assert said(found.texts[0]) == [("Hello", False), ("world!</s>", True)]
    assert "-- learned, " in str(found)
    assert "1 of 1 turns and answers end in '</s>', which is learned" in str(found)


def test_nothing_moves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before, state = sorted(folder.rglob("*")), torch.get_rng_state()
    module, data = CausalLM("base"), data_of(folder)
    data.trainer = other = object()  # type: ignore[assignment]
    preview(data, module)
    assert data.trainer is other
    assert module.network is None  # no weights
    assert module._trainer is None  # type: ignore[has-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(folder.rglob("*")) == before


def test_a_second_preview_and_training_after_it_are_the_same(folder: Path) -> None:
    data, module = data_of(folder, val=0.5), CausalLM(str(folder / "base"))
    first = preview(data, module)
    assert str(preview(data, module)) == str(first)
    assert data._records.keys() == {"val"}  # those of training were let go again
    fresh = data_of(folder, val=0.5, tokenizer=str(folder / "base"))
    fresh.setup("fit")
    assert data.prepared("train").lengths == fresh.prepared("train").lengths


def test_token_ids_of_any_loader(folder: Path) -> None:
    tokenizer = tiny_tokenizer("chatml")
    ids = torch.tensor([tokenizer("Hello world!")["input_ids"] + [tokenizer.pad_token_id] * 2] * 3)
    length = ids.shape[1] - 2
    labels = ids.masked_fill(torch.arange(length + 2) < length - 1, -100)
    labels[:, length:] = -100
    rows = [{"input_ids": i, "attention_mask": (torch.arange(length + 2) < length).long(), "labels": y} for i, y in zip(ids, labels, strict=True)]  # fmt: skip
    found = preview(DataLoader(rows, batch_size=3), CausalLM(str(folder / "base")), rows=2)
    assert [said(text) for text in found.texts] == [[("Hello world", False), ("!", True)]] * 2
    assert f"batch['input_ids']      │ 3 x {length + 2}" in str(found)
    assert not preview(DataLoader(rows, batch_size=3)).texts  # nobody says which tokenizer


def test_what_cannot_be_previewed(folder: Path) -> None:
    module = CausalLM(str(folder / "base"))
    assert message_of(ConfigError, preview, data_of(folder), module, rows=0) == (
        "rows must be at least 1, found 0. (rows)"
    )
    assert "(data.train)" in message_of(ConfigError, preview, TextDataModule(), module)
    assert "no data to preview: give a data module" in message_of(ConfigError, preview)
    assert "neither a data module nor" in message_of(ConfigError, preview, None, module)
    assert "(data.tokenizer)" in message_of(ConfigError, preview, data_of(folder))
    assert "c.jsonl, line 4: nothing of this example would be learned" in message_of(
        RecordError, preview, data_of(folder, untrainable="error"), module
    )
    assert "reads like a text" in message_of(RecordError, preview, TextDataModule("a text"), module)
