"""What a causal LM learns of documents, prompts with completions, and chats: token by token."""

import pytest
from tiny_lm import tiny_tokenizer

from lora_lightning.data.encoding import Encoder
from lora_lightning.data.samples import IGNORED, Chat

WHERE = "my.jsonl, line 3"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
TWO_TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "I am fine."},
    {"role": "user", "content": "What is two?"},
    {"role": "assistant", "content": "It is five."},
]


def chat(*messages, **options):
    return Chat(tuple(messages), WHERE, **options)


def learned(tokenizer, example):
    """(token, learned?) for each token."""
    assert len(example.labels) == len(example.input_ids)
    pairs = list(zip(example.input_ids, example.labels, strict=True))
    assert all(label in (token, IGNORED) for token, label in pairs)
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    return [(t, label != IGNORED) for t, (_, label) in zip(tokens, pairs, strict=True)]


def read(tokens):
    return [(token, False) for token in tokens.split(" ")]


def learn(tokens):
    return [(token, True) for token in tokens.split(" ")]


# What is learned of SYSTEM (where the template takes one) and TWO_TURNS, written by hand.
BY_HAND = {
    "chatml": read("<|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġassistant . <|im_end|> Ċ")
    + read("<|im_start|> user Ċ Hello <|im_end|> Ċ")
    + read("<|im_start|> assistant Ċ")
    + learn("I Ġam Ġfine . <|im_end|>")
    + read("Ċ")
    + read("<|im_start|> user Ċ What Ġis Ġtwo ? <|im_end|> Ċ")
    + read("<|im_start|> assistant Ċ")
    + learn("It Ġis Ġfive . <|im_end|>"),
    "llama3": read("<|begin_of_text|>")
    + read("<|start_header_id|> system <|end_header_id|> ĊĊ")
    + read("You Ġare Ġa Ġhelpful Ġassistant . <|eot_id|>")
    + read("<|start_header_id|> user <|end_header_id|> ĊĊ Hello <|eot_id|>")
    + read("<|start_header_id|> assistant <|end_header_id|> ĊĊ")
    + learn("I Ġam Ġfine . <|eot_id|>")
    + read("<|start_header_id|> user <|end_header_id|> ĊĊ What Ġis Ġtwo ? <|eot_id|>")
    + read("<|start_header_id|> assistant <|end_header_id|> ĊĊ")
    + learn("It Ġis Ġfive . <|eot_id|>"),
    "gemma": read("<bos> <start_of_turn> user \n Hello <end_of_turn> \n")
    + read("<start_of_turn> model \n")
    + learn("I ▁am ▁ fine . <end_of_turn>")
    + read("\n <start_of_turn> user \n What ▁is ▁two ? <end_of_turn> \n")
    + read("<start_of_turn> model \n")
    + learn("It ▁is ▁five . <end_of_turn>"),
}


def two_turns(style):
    return chat(*([] if style == "gemma" else [SYSTEM]), *TWO_TURNS)


@pytest.mark.parametrize("style", BY_HAND)
def test_every_assistant_turn_and_its_end_is_learned(style):
    tokenizer = tiny_tokenizer(style)
    (example,) = Encoder(tokenizer, 512).encode(two_turns(style))
    assert learned(tokenizer, example) == BY_HAND[style]
