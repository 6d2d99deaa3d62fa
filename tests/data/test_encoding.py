"""What a causal LM learns of documents, prompts with completions, and chats: token by token."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.data.encoding.causal_lm import Encoder
from lora_lightning.data.encoding.chat_labels import ChatTurns
from lora_lightning.data.samples.sample import Chat, Document, PromptCompletion
from lora_lightning.utilities.constants import IGNORE_INDEX
from tests.helpers.tiny_lm import CHATML, tiny_tokenizer

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
    assert all(label in (token, IGNORE_INDEX) for token, label in pairs)
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    return [(t, label != IGNORE_INDEX) for t, (_, label) in zip(tokens, pairs, strict=True)]


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


def shifted(texts):
    return [(t, [(a + 1, min(b + 1, len(t))) for a, b in spans]) for t, spans in texts]


def last_turn_only(texts):
    return [(text, spans[-1:]) for text, spans in texts]


def without_end_of_turn(texts):
    ends = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
    return [
        (t, [(a, a + len(t[a:b].removesuffix(next(e for e in ends if t[a:b].endswith(e))))) for a, b in spans])
        for t, spans in texts
    ]  # fmt: skip


@pytest.mark.parametrize("style", BY_HAND)
@pytest.mark.parametrize("broken", [shifted, last_turn_only, without_end_of_turn])
def test_that_check_can_fail(style, broken, monkeypatch):
    right = ChatTurns.texts
    monkeypatch.setattr(ChatTurns, "texts", lambda self, chat: broken(right(self, chat)))
    tokenizer = tiny_tokenizer(style)
    (example,) = Encoder(tokenizer, 512).encode(two_turns(style))
    assert learned(tokenizer, example) != BY_HAND[style]


@pytest.mark.parametrize("style", BY_HAND)
def test_a_chat_is_what_transformers_makes_of_it(style):
    """And each learned turn follows exactly what the model would be given to write it."""
    tokenizer, sample = tiny_tokenizer(style), two_turns(style)
    encoder = Encoder(tokenizer, 512)
    (example,) = encoder.encode(sample)
    ids, messages = example.input_ids, list(sample.messages)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(ids)] == ids
    assert tokenizer.decode(whole[len(ids) :]) in ("", "\n")  # after the last turn's end
    starts = [
        n for n, y in enumerate(example.labels) if n and y != IGNORE_INDEX == example.labels[n - 1]
    ]
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    for start, turn in zip(starts, turns, strict=True):
        asked = tokenizer.apply_chat_template(
            messages[:turn], add_generation_prompt=True, return_dict=False
        )
        assert ids[:start] == asked
        assert encoder.encode_prompts([chat(*messages[:turn])]) == [asked]


contents = st.text(alphabet="aé🙂 \n\t1.'", max_size=12)
TOKENIZERS = {style: tiny_tokenizer(style) for style in BY_HAND}


@pytest.mark.parametrize("style", BY_HAND)
@settings(max_examples=100, deadline=None)
@given(question=contents, answer=contents, other=contents)
def test_any_content(style, question, answer, other):
    tokenizer = TOKENIZERS[style]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": other},
        {"role": "assistant", "content": "Hello"},
    ]
    (example,) = Encoder(tokenizer, 512).encode(chat(*messages))
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.input_ids) == text.removesuffix("\n")
    asked = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    assert example.input_ids[: len(asked)] == asked
    assert set(example.labels[: len(asked)]) == {IGNORE_INDEX} != {example.labels[len(asked)]}
    runs = "".join("L" if y != IGNORE_INDEX else " " for y in example.labels).split()
    assert len(runs) == 2
    end = tokenizer.convert_tokens_to_ids(BY_HAND[style][-1][0])
    assert sum(y == end for y in example.labels) == 2


def test_a_turn_that_is_only_read():
    tokenizer = tiny_tokenizer("chatml")
    (example,) = Encoder(tokenizer, 512).encode(chat(SYSTEM, *TWO_TURNS, unlearned=(2,)))
    hidden = learned(tokenizer, example)
    assert [t for t, _ in hidden] == [t for t, _ in BY_HAND["chatml"]]
    assert [t for t, y in hidden if y] == ["It", "Ġis", "Ġfive", ".", "<|im_end|>"]
    first = Encoder(tokenizer, 512).encode(chat(SYSTEM, *TWO_TURNS, unlearned=(4,)))[0]
    assert learned(tokenizer, first) == BY_HAND["chatml"][: len(first.labels)]
    assert first.labels[-1] == tokenizer.eos_token_id  # nothing is kept after what is learned


@pytest.mark.parametrize("style", BY_HAND)
def test_train_on_prompt_learns_all_but_the_first_token(style):
    tokenizer = tiny_tokenizer(style)
    encoder = Encoder(tokenizer, 512, train_on_prompt=True)
    for sample in (two_turns(style), PromptCompletion("Question:", " Paris", WHERE)):
        (example,) = encoder.encode(sample)
        assert [y for _, y in learned(tokenizer, example)] == [False] + [True] * (
            len(example.labels) - 1
        )


TEXTS = [
    # manner, bos, prompt, completion, tokens
    ("gpt2", None, "Question:", " Paris", read("Question :") + learn("Ġ Paris </s>")),
    # The blank belongs to the prompt, which ends in it when the model is asked.
    ("gpt2", None, "Answer: ", "the dog", read("Answer : Ġ") + learn("the Ġdog </s>")),
    # Alone, the prompt ends in one token of two breaks; before a word they would be two.
    ("gpt2", "<s>", "Answer:\n\n", "Paris", read("<s> Answer : ĊĊ") + learn("Paris </s>")),
    ("llama3", "<s>", "Answer:\n\n", "Paris", read("<s> Answer : ĊĊ") + learn("Paris </s>")),
    ("sentencepiece", "<s>", "What is ", "five", read("<s> What ▁is ▁") + learn("five </s>")),
    # This tokenizer puts a blank before every text, which is no part of a completion.
    ("sentencepiece-prefix", "<s>", "What ", "five", read("<s> ▁What ▁") + learn("five </s>")),
    ("sentencepiece-prefix", "<s>", "What", " is", read("<s> ▁What") + learn("▁is </s>")),
    ("gpt2", "<s>", "", "Paris", read("<s>") + learn("Paris </s>")),
    ("gpt2", None, "", "Paris is", read("Paris") + learn("Ġis </s>")),  # nothing predicts the first
    # Written out in the file, neither is doubled.
    ("gpt2", "<s>", "<s>Answer:", "Paris</s>", read("<s> Answer :") + learn("Paris </s>")),
]


@pytest.mark.parametrize(("manner", "bos", "prompt", "completion", "tokens"), TEXTS)
def test_a_completion_and_its_end_are_learned(manner, bos, prompt, completion, tokens):
    tokenizer = tiny_tokenizer(manner=manner, bos=bos)
    encoder = Encoder(tokenizer, 512)
    sample = PromptCompletion(prompt, completion, WHERE)
    (example,) = encoder.encode(sample)
    assert learned(tokenizer, example) == tokens
    alone = tokenizer(prompt).input_ids
    if not prompt.startswith("<s>"):  # where transformers doubles it
        assert example.input_ids[: len(alone)] == alone
        assert encoder.encode_prompts([sample]) == [alone]


def test_joint_tokens_would_differ():
    """The cases above are not trivial: tokenised at once, their prompts' ids are others."""
    cases = [(t[0], t[2], t[3]) for t in TEXTS if t[2].endswith((" ", "\n"))]
    differ = 0
    for manner, prompt, completion in cases:
        tokenizer = tiny_tokenizer(manner=manner)
        alone = tokenizer(prompt).input_ids
        differ += tokenizer(prompt + completion).input_ids[: len(alone)] != alone
    assert differ >= 3


def test_a_document_is_learned_as_a_whole():
    tokenizer = tiny_tokenizer("gemma")
    sample = Document("Hello.", WHERE)
    (example,) = Encoder(tokenizer, 512).encode(sample)
    assert learned(tokenizer, example) == read("<bos>") + learn("Hello . <eos>")
    assert Encoder(tokenizer, 512).encode_prompts([sample]) == [tokenizer("Hello.").input_ids]


def test_a_tokenizer_that_ends_texts_itself():
    """Its end of text is no part of a prompt."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer(bos="<s>")
    both = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=both
    )
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    encoder = Encoder(tokenizer, 512)
    (example,) = encoder.encode(PromptCompletion("Answer:", "Paris", WHERE))
    assert learned(tokenizer, example) == read("<s> Answer :") + learn("Paris </s>")
    assert encoder.encode_prompts([Document("Hello", WHERE)])[0] == example.input_ids[:1] + (
        tokenizer("Hello", add_special_tokens=False).input_ids
    )


def test_a_slow_tokenizer():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    (example,) = Encoder(tokenizer, 512).encode(
        chat({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é"})
    )
    assert [t for t, y in learned(tokenizer, example) if y] == ["Ã", "©", "<|im_end|>"]


def test_blocks_change_nothing(monkeypatch):
    tokenizer = tiny_tokenizer("llama3")
    encoder = Encoder(tokenizer, 512)
    samples = [
        Document("Hello", WHERE),
        two_turns("llama3"),
        PromptCompletion("Answer: ", "Paris", WHERE),
        Document("Hello", WHERE),
        chat(*TWO_TURNS[:2]),
    ]
    one_by_one = [e for s in samples for e in encoder.encode(s)]
    assert list(encoder.encode_all(samples)) == one_by_one
    monkeypatch.setattr("lora_lightning.data.encoding.sample_encoder.BLOCK", 2)
    assert list(encoder.encode_all(iter(samples))) == one_by_one
    assert encoder.encode_block([]) == []


def test_an_encoder_reaches_other_processes():
    encoder = Encoder(tiny_tokenizer("llama3"), 512)
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.encode(two_turns("llama3")) == encoder.encode(two_turns("llama3"))
