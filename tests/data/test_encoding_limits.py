"""Examples that are too long, that teach nothing, and how both are counted."""

from itertools import pairwise

import pytest

from lora_lightning.data.encoding.causal_lm import Encoder
from lora_lightning.data.encoding.sample_encoder import EncodingReport
from lora_lightning.data.encoding.seq2seq_lm import Seq2SeqEncoder
from lora_lightning.data.samples.sample import Chat, Document, PromptCompletion
from lora_lightning.errors import ConfigError, RecordError
from lora_lightning.utilities.constants import IGNORE_INDEX
from tests.helpers.messages import message_of
from tests.helpers.tiny_lm import tiny_tokenizer

SHORT = PromptCompletion("Question:", " It is five.", "my.jsonl, line 1")  # 2 + 4 + 1 tokens
LONG = PromptCompletion("What is two?", " It is five.", "my.jsonl, line 2")  # 4 + 4 + 1
READ_ONLY = PromptCompletion("You are a helpful assistant.", " Yes", "my.jsonl, line 3")  # 6 + ...


def encoder(max_length=7, **options):
    return Encoder(tiny_tokenizer(), max_length, **options)


def message(call, error=RecordError):
    return message_of(error, call)


def test_the_beginning_is_kept_and_cuts_are_counted():
    report = EncodingReport()
    whole = encoder(512).encode(LONG)[0]
    examples = list(encoder(7).encode_all([SHORT, LONG], report))
    assert [len(e.input_ids) for e in examples] == [7, 7]
    assert examples[0] == encoder(512).encode(SHORT)[0]  # just fits: not cut
    assert examples[1].input_ids == whole.input_ids[:7]
    assert examples[1].labels == whole.labels[:7]
    assert report == EncodingReport(examples=2, tokens=14, learned=5 + 3, truncated=1)
    assert report.line("train", encoder(7).limit) == (
        "train: 2 examples, 14 tokens, 57 % of them learned; 1 cut to 7 tokens (data.max_length)"
    )


def test_longer_examples_can_be_dropped_or_refused():
    report = EncodingReport()
    assert len(list(encoder(7, too_long="drop").encode_all([SHORT, LONG], report))) == 1
    assert report.line("val", "7 tokens") == (
        "val: 1 examples, 7 tokens, 71 % of them learned; 1 dropped, longer than 7 tokens "
        "(data.too_long)"
    )
    assert message(lambda: encoder(7, too_long="error").encode(LONG)) == (
        "my.jsonl, line 2: the example has 9 tokens, and 7 tokens are allowed. Allow more "
        "(data.max_length), or say that longer ones are cut, split or dropped: too_long: truncate, "
        "split or drop. (data.too_long)"
    )
    assert encoder(7, too_long="error").encode(SHORT)


@pytest.mark.parametrize("words", [1, 5, 6, 7, 11, 12, 13, 18, 40])
def test_documents_can_be_split(words):
    """Each token but the first is learned once, from the token before it."""
    document = Document(" ".join("abcdefghij"[i % 10] for i in range(words)), "my.txt, line 1")
    (whole,) = encoder(512).encode(document)
    report = EncodingReport()
    parts = encoder(7, too_long="split").encode(document, report)
    assert all(2 <= len(part.input_ids) <= 7 for part in parts)
    assert all(len(part.input_ids) == 7 for part in parts[:-1])
    learned = [
        (before, label)
        for part in parts
        for before, label in zip(part.input_ids, part.labels[1:], strict=False)
    ]
    assert learned == [*pairwise(whole.input_ids)]
    assert all(part.labels[0] == IGNORE_INDEX for part in parts)
    assert all(
        label in (IGNORE_INDEX, token)
        for part in parts
        for token, label in zip(part.input_ids, part.labels, strict=True)
    )
    assert report.split_documents == (len(whole.input_ids) > 7)
    assert report.examples == len(parts)
    assert report.learned == len(whole.input_ids) - 1


def test_only_documents_can_be_split():
    report = EncodingReport()
    encoder(7, too_long="split").encode(Document("a b c d e f g h i", "my.txt, line 1"), report)
    assert report.line("train", "7 tokens").endswith(
        "1 documents, longer than 7 tokens, go on in further examples (data.too_long)"
    )
    assert message(lambda: encoder(7, too_long="split").encode(LONG)) == (
        "my.jsonl, line 2: the example has 9 tokens, 7 tokens are allowed, and only documents "
        "(format: text) can be split. Allow more (data.max_length), or choose truncate, drop or "
        "error. (data.too_long)"
    )
    assert encoder(7, too_long="split").encode(SHORT)


def test_an_example_that_teaches_nothing_is_an_error():
    assert message(lambda: encoder(5).encode(READ_ONLY)) == (
        "my.jsonl, line 3: nothing of this example would be learned: its first 6 tokens are only "
        "read, and it is cut to 5 tokens. Allow more (data.max_length), or leave such examples "
        "out: untrainable: drop. (data.untrainable)"
    )
    monologue = Chat(({"role": "user", "content": "Hello"},), "my.jsonl, line 9")
    chats = Encoder(tiny_tokenizer("chatml"), 512)
    assert message(lambda: chats.encode(monologue)) == (
        "my.jsonl, line 9: nothing of this example would be learned: it has no text, or no turn of "
        "the assistant, to learn. Remove it, or leave such examples out: untrainable: drop. (data.untrainable)"
    )


def test_or_it_is_dropped_and_counted():
    report = EncodingReport()
    encode = encoder(6, untrainable="drop")
    assert len(list(encode.encode_all([READ_ONLY, SHORT], report))) == 1
    assert report == EncodingReport(examples=1, tokens=6, learned=4, truncated=1, untrainable=1)
    assert report.line("train", encode.limit) == (
        "train: 1 examples, 6 tokens, 67 % of them learned; 1 cut to 6 tokens (data.max_length); "
        "1 dropped, nothing of them would be learned (data.untrainable)"
    )


def test_options_that_cannot_be():
    assert message(lambda: encoder(1), ConfigError) == (
        "max_length must be at least 2 tokens, found 1. (data.max_length)"
    )
    assert message(lambda: encoder(too_long="trunc"), ConfigError) == (
        "too_long must be one of truncate, split, drop, error; found 'trunc'. Did you mean 'truncate'? "
        "(data.too_long)"
    )
    assert "(data.untrainable)" in message(lambda: encoder(untrainable="skip"), ConfigError)
    endless = Encoder(tiny_tokenizer(eos=None), 9)
    assert message(lambda: endless.encode(Document("a b", "")), ConfigError) == (
        "the tokenizer of '' has no end-of-sequence token, so the model could not learn where a "
        "text ends. Name one that has. (data.tokenizer)"
    )


# Encoder-decoders -------------------------------------------------------------------------------


def t5_tokenizer():
    """As T5's: </s> after a text and after a target."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("tokenizer", [t5_tokenizer(), tiny_tokenizer()], ids=["t5", "no end"])
def test_prompt_and_target_carry_the_tokenizers_own_marks(tokenizer):
    (example,) = Seq2SeqEncoder(tokenizer, 512).encode(SHORT)
    assert example.input_ids == tokenizer(SHORT.prompt).input_ids
    target = tokenizer(SHORT.completion, add_special_tokens=False).input_ids
    assert example.labels == [*target, tokenizer.eos_token_id]  # all learned, and where it ends
    assert IGNORE_INDEX not in example.labels


def test_both_are_cut_and_counted():
    report, tokenizer = EncodingReport(), t5_tokenizer()
    encode = Seq2SeqEncoder(tokenizer, 4, max_target_length=3)
    whole = Seq2SeqEncoder(tokenizer, 512).encode(LONG)[0]
    (example,) = encode.encode(LONG, report)
    # The prompt keeps its end mark; a target that is cut has none: the model must not stop there.
    assert example.input_ids == [*whole.input_ids[:3], tokenizer.eos_token_id]
    assert example.labels == whole.labels[:3]
    assert report == EncodingReport(examples=1, tokens=7, learned=3, truncated=1)
    assert report.line("train", encode.limit) == (
        "train: 1 examples, 7 tokens, 43 % of them learned; 1 cut to 4 tokens and 3 of the target "
        "(data.max_length)"
    )
    assert Seq2SeqEncoder(tokenizer, 5, max_target_length=5).encode(LONG) == [whole]  # just fits
    assert message(lambda: Seq2SeqEncoder(tokenizer, 9, max_target_length=1), ConfigError) == (
        "max_target_length must be at least 2 tokens, found 1. (data.max_target_length)"
    )


def test_what_is_no_pair_is_refused():
    encode = Seq2SeqEncoder(t5_tokenizer(), 512)
    assert message(lambda: encode.encode(Document("Hello", "my.jsonl, line 4"))) == (
        "my.jsonl, line 4: an encoder-decoder reads a prompt and learns its completion, but this "
        "is a document. Give both, or train a causal LM. (data.format)"
    )
    assert encode.encode_prompts([SHORT]) == [encode.encode(SHORT)[0].input_ids]
    assert encode.encode_block([]) == []
