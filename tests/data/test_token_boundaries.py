"""Token ids of texts in pieces, against the tokenizer itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.data.encoding.token_boundaries import PieceTokenizer
from tests.helpers.tiny_lm import tiny_tokenizer

MANNERS = ("gpt2", "llama3", "sentencepiece", "sentencepiece-prefix")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<pad>", "</s>")
TOKENIZERS = {m: tiny_tokenizer(manner=m, special=("<|im_start|>", "<|im_end|>")) for m in MANNERS}
PIECES = {manner: PieceTokenizer(tokenizer) for manner, tokenizer in TOKENIZERS.items()}

words = st.sampled_from(
    ["Hello", " the", "dog", "\n", "\n\n", " ", "\t", "é", "🙂", "12", "345", "'s", *SPECIAL]
)
piece = st.lists(words, max_size=5).map("".join)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.slow
@pytest.mark.parametrize("manner", MANNERS)
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.lists(piece, min_size=1, max_size=4), min_size=1, max_size=3))
def test_pieces_are_the_text(manner, texts):
    tokenizer = TOKENIZERS[manner]
    for pieces, found in zip(texts, PIECES[manner](texts), strict=True):
        ids = [token for part in found for token in part]
        text = "".join(pieces)
        if len(pieces) == 1:
            assert ids == ids_of(tokenizer, text)
        # The first piece's ids are those that it has alone, as when the model goes on from it.
        assert found[0] == ids_of(tokenizer, pieces[0])
        assert tokenizer.decode(ids) == tokenizer.decode(ids_of(tokenizer, text))


@pytest.mark.slow
@pytest.mark.parametrize("manner", MANNERS)
@settings(max_examples=100, deadline=None)
@given(first=piece, second=piece)
def test_pieces_are_tokenised_together_where_that_is_right(manner, first, second):
    tokenizer = TOKENIZERS[manner]
    joint, alone = ids_of(tokenizer, first + second), ids_of(tokenizer, first)
    ((before, after),) = PIECES[manner]([[first, second]])
    if joint[: len(alone)] == alone and first:
        assert before + after == joint


def test_thousands_of_reserved_tokens():
    """Of tokens that differ in a number, only those that there are count."""
    tokenizer = tiny_tokenizer(special=tuple(f"<unused{n}>" for n in range(3000)), vocab_size=4000)
    pieces = PieceTokenizer(tokenizer)
    text = "a<unused17>b<unused2999><unused5000>\n\n"
    ((found, _),) = pieces([[text, "Hello"]])
    assert found == ids_of(tokenizer, text)
    assert sum(t >= tokenizer.convert_tokens_to_ids("<unused0>") for t in found) >= 2


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_added_tokens_that_swallow_white_space(side):
    """As Phi-3's, which take the line break after them."""
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken("<|end|>", special=True, normalized=False, **{side: True})]}
    )  # fmt: skip
    pieces, text = PieceTokenizer(tokenizer), ["Hello <|end|>\n", "\tdog", " <|end|> \n", "the"]
    (found,) = pieces([text])
    assert [token for part in found for token in part] == ids_of(tokenizer, "".join(text))
    assert found[0] == ids_of(tokenizer, text[0])
