"""Templates of other manners: marked turns, rewritten turns, tools, refusals."""

import pytest

from lora_lightning.data.encoding.causal_lm import Encoder
from lora_lightning.data.encoding.sample_encoder import EncodingReport
from lora_lightning.data.samples.sample import Chat
from lora_lightning.errors import ConfigError, RecordError
from lora_lightning.utilities.constants import IGNORE_INDEX
from tests.helpers.messages import message_of
from tests.helpers.tiny_lm import CHATML, tiny_tokenizer

WHERE = "my.jsonl, line 3"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


TALK = (user("Hello"), assistant("I am fine."), user("What is two?"), assistant("It is five."))
LEARNED = ["I am fine.<|im_end|>", "It is five.<|im_end|>"]


def learned_parts(tokenizer, example):
    """The runs of learned tokens as text."""
    parts, before = [], IGNORE_INDEX
    for label in example.labels:
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                parts.append([])
            parts[-1].append(label)
        before = label
    return [tokenizer.decode(part) for part in parts]


def encoded(template, messages, report=None, tools=(), **options):
    """(whole text, learned parts) of each example."""
    tokenizer = tiny_tokenizer("chatml")
    encoder = Encoder(tokenizer, 512, chat_template=template, **options)
    examples = encoder.encode(Chat(tuple(messages), WHERE, tools), report)
    return [(tokenizer.decode(e.input_ids), learned_parts(tokenizer, e)) for e in examples]


def refusal(template, messages, error=RecordError, **options):
    return message_of(error, encoded, template, messages, **options)


def marked(block):
    """ChatML in which `block` writes what the model generates."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
        "{% if message.role == 'assistant' %}" + block + "{% else %}"
        "{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


MARKED = [
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
    # The line break after the end of the turn is no part of it.
    "{%- generation -%}{{ message.content + '<|im_end|>\\n' }}{%- endgeneration -%}",
    # The end of the turn is learned though the block leaves it out.
    "{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
]


@pytest.mark.parametrize("block", MARKED)
def test_marked_turns(block):
    plain = encoded(None, TALK)
    assert plain[0][1] == LEARNED
    assert encoded(marked(block), TALK) == plain


def test_a_turn_of_several_blocks():
    block = (
        "{% generation %}{% endgeneration %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{{ ' ' }}{% generation %}{{ '<|im_end|>\\n' }}{% endgeneration %}"
    )
    ((text, parts),) = encoded(marked(block), TALK[:2])
    assert text.endswith("assistant\nI am fine. <|im_end|>")
    assert parts == ["I am fine.", "<|im_end|>"]


def test_what_is_given_to_the_model_is_not_learned_though_marked():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert encoded(template, TALK) == encoded(None, TALK)


def test_blocks_say_what_is_learned_where_the_generation_prompt_is_another():
    block = "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    opens_thinking = marked(block).replace("assistant\\n' }}", "assistant\\n<think>' }}")
    ((_, parts),) = encoded(opens_thinking, TALK)
    assert parts == LEARNED


def test_marks_say_what_is_learned():
    block = (
        "{{ 'Answer: ' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    )
    ((text, parts),) = encoded(marked(block), TALK)
    assert "assistant\nAnswer: I am fine.<|im_end|>" in text
    assert parts == LEARNED


def test_a_marked_turn_that_begins_with_a_blank():
    """transformers' own mask of such a turn is empty with tokenizers that trim offsets."""
    talk = (user("Hello"), assistant("  fine"))
    ((_, parts),) = encoded(marked(MARKED[0]), talk)
    assert parts == ["  fine<|im_end|>"]
    tokenizer = tiny_tokenizer("chatml")
    theirs = tokenizer.apply_chat_template(
        list(talk), chat_template=marked(MARKED[0]), return_assistant_tokens_mask=True,
        return_dict=True,
    )  # fmt: skip
    assert sum(theirs["assistant_masks"]) == 0


def test_a_turn_without_mark_is_an_error():
    block = (
        "{% if message.content != 'I am fine.' %}{% generation %}{{ message.content }}"
        "{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}"
    )
    assert refusal(marked(block), TALK) == (
        "my.jsonl, line 3, message 2: the chat template has {% generation %} blocks, but none "
        "marks this turn. Mark every assistant turn, or take the blocks out: then all are learned. "
        "(data.chat_template)"
    )


def test_a_template_that_marks_the_last_turn_only():
    block = (
        "{% if loop.last %}{% generation %}{{ message.content + '<|im_end|>\\n' }}"
        "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}"
    )
    assert encoded(marked(block), TALK) == encoded(None, TALK)


def test_marks_do_not_overrule_turns_that_are_only_read():
    tokenizer = tiny_tokenizer("chatml")
    encoder = Encoder(tokenizer, 512, chat_template=marked(MARKED[0]))
    (example,) = encoder.encode(Chat(TALK, WHERE, unlearned=(1,)))
    assert learned_parts(tokenizer, example) == LEARNED[1:]


# As Qwen3's: thinking is written only after the last message of the user.
THINKING = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content and loop.index0 > last.user %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_rewritten_turns_become_examples_with_the_context_of_inference():
    talk = [
        user("Hello"),
        assistant("I am", reasoning_content="one"),
        assistant("fine.", reasoning_content="two"),
        user("What?"),
        assistant("Five.", reasoning_content="three"),
    ]
    report = EncodingReport()
    examples = encoded(THINKING, talk, report)
    first, last = "<|im_start|>user\nHello<|im_end|>\n", "<|im_start|>user\nWhat?<|im_end|>\n"
    begin = "<|im_start|>assistant\n"
    assert examples == [
        (  # two turns before the next message of the user: nothing is rewritten
            f"{first}{begin}<think>one</think>I am<|im_end|>\n"
            f"{begin}<think>two</think>fine.<|im_end|>",
            ["<think>one</think>I am<|im_end|>", "<think>two</think>fine.<|im_end|>"],
        ),
        (
            f"{first}{begin}I am<|im_end|>\n{begin}fine.<|im_end|>\n{last}"
            f"{begin}<think>three</think>Five.<|im_end|>",
            ["<think>three</think>Five.<|im_end|>"],
        ),
    ]
    assert (report.split_chats, report.examples) == (1, 2)
    assert "1 chats became several examples" in report.line("train", "512 tokens")
    # Without thinking nothing is rewritten, and the chat stays whole.
    assert encoded(THINKING, TALK) == encoded(None, TALK)


def test_a_generation_prompt_that_the_turn_does_not_begin_with_is_an_error():
    opens_thinking = CHATML.replace("assistant\\n' }}", "assistant\\n<think>' }}")
    assert refusal(opens_thinking, TALK) == (
        "my.jsonl, line 3, message 2: the chat template lets the model write this turn after '<think>', but the turn itself "
        "begins with 'I am fine.<|im_end|>\\n' there, so it cannot be learned as it would be "
        "generated. Put into the message what belongs there (reasoning_content), set what the "
        "template reads (data.chat_template_kwargs, such as enable_thinking: false), or give "
        "another template. (data.chat_template)"
    )
    ((_, parts),) = encoded(opens_thinking, [user("Hello"), assistant("<think>one</think>I am")])
    assert parts == ["one</think>I am<|im_end|>"]


def test_options_of_the_template():
    template = CHATML.replace("{% if add", "{{ note }}{% if add")
    options = {"chat_template_kwargs": {"note": "by hand"}}
    tokenizer = tiny_tokenizer("chatml")
    encoder = Encoder(tokenizer, 512, chat_template=template, **options)
    (prompt,) = encoder.encode_prompts([Chat(TALK[:1], WHERE)])
    assert "by hand" in tokenizer.decode(prompt)


TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_tool_calls_are_learned_and_their_results_are_not():
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}
    messages = [
        user("What is two?"),
        assistant(None, tool_calls=[call]),
        {"role": "tool", "content": "five"},
        assistant("It is five."),
    ]
    tool = {"type": "function", "function": {"name": "sum", "parameters": {}}}
    ((text, parts),) = encoded(TOOLS, messages, tools=(tool,))
    assert '"name": "sum"' in text
    assert parts == ["<call>sum</call><|im_end|>", "It is five.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message", "lost"),
    [
        (CHATML, assistant("", tool_calls=[{"function": {"name": "sum"}}]), "tool calls"),
        (CHATML, assistant("Hello", reasoning_content="one"), "thinking"),
        (CHATML.replace("+ message['content'] +", "+"), assistant("Hello"), "content"),
    ],
)
def test_what_a_template_leaves_out_is_an_error(template, message, lost):
    assert refusal(template, [user("Hello"), message]) == (
        f"my.jsonl, line 3, message 2: the chat template does not write this turn's {lost}, so it "
        "cannot be learned. Take it out of the message, or give a template that writes it. "
        "(data.chat_template)"
    )


def test_what_a_template_trims_or_takes_out_of_the_content_is_not_lost():
    trims = CHATML.replace("message['content']", "message['content'].split('</think>')[-1] | trim")
    ((_, parts),) = encoded(trims, [user("Hello"), assistant("one</think>\n\nHello\nworld \n")])
    assert parts == ["Hello\nworld<|im_end|>"]


def test_an_assistant_that_speaks_first():
    ((text, parts),) = encoded(None, [assistant("Hello"), *TALK])
    assert text.startswith("<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n")
    assert parts == ["Hello<|im_end|>", *LEARNED]
    headless = "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    assert refusal(headless, [assistant("Hello")]) == (
        "my.jsonl, line 3: the chat begins with an assistant turn, and the chat template does not "
        "show where the model would begin to write it. Begin with a system or user message. "
        "(data.chat_template)"
    )


def test_turns_without_an_end_are_learned_and_reported():
    plain = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    report = EncodingReport()
    ((_, parts),) = encoded(plain, TALK, report)
    assert parts == [" I am fine.\n", " It is five.\n"]
    assert report.unended_chats == 1
    assert "1 chats end in no special token, so the model does not learn to stop" in report.line(
        "train", "512 tokens"
    )
    report = EncodingReport()
    encoded(None, TALK, report)
    assert report.unended_chats == 0


def test_a_generation_prompt_that_ends_in_a_blank():
    """Tokens that straddle the start of a turn are cut there, as they are at inference."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template, eos="</s>")
    (example,) = Encoder(tokenizer, 512).encode(Chat((user("Hello"), assistant("the dog")), WHERE))
    asked = tokenizer.apply_chat_template(
        [user("Hello")], add_generation_prompt=True, return_dict=False
    )
    assert example.input_ids[: len(asked)] == asked
    assert tokenizer.convert_ids_to_tokens(asked)[-1] == "Ġ"
    assert learned_parts(tokenizer, example) == ["the dog</s>"]
    whole = tokenizer.apply_chat_template([user("Hello"), assistant("the dog")], return_dict=False)
    assert whole[: len(asked)] != asked  # " the" is one token there


def test_a_template_from_a_file(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    assert encoded(str(file), TALK) == encoded(None, TALK)
    assert refusal(str(tmp_path / "chat.jina"), TALK, ConfigError) == (
        f"chat_template '{tmp_path}/chat.jina' is no file, no Jinja, and no template of the "
        f"tokenizer. Did you mean '{file}'? (data.chat_template)"
    )
    assert refusal("{% for m in messages %}", TALK, ConfigError).startswith(
        "the chat template is no valid Jinja, line 1: "
    )


def test_named_templates():
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = {"plain": CHATML, "loud": CHATML.replace("+ '<", "+ '!!<")}
    sample = Chat(TALK, WHERE)
    (example,) = Encoder(tokenizer, 512, chat_template="loud").encode(sample)
    assert "I am fine.!!<|im_end|>" in tokenizer.decode(example.input_ids)
    with pytest.raises(ConfigError, match="has no chat template that is used by default"):
        Encoder(tokenizer, 512).encode(sample)


def test_refusals_name_the_record():
    gemma = Encoder(tiny_tokenizer("gemma"), 512)
    system = {"role": "system", "content": "Be brief."}
    with pytest.raises(RecordError) as error:
        gemma.encode(Chat((system, *TALK), WHERE))
    assert str(error.value) == (
        "my.jsonl, line 3: the chat template refuses this chat: System role not supported. Write "
        "the system message's text at the start of the first user message, or give a template "
        "that takes it. (data.chat_template)"
    )
    with pytest.raises(RecordError, match=r"must alternate.*Change the messages, or give"):
        gemma.encode(Chat((user("a"), user("b"), assistant("c")), WHERE))
    chatml = Encoder(tiny_tokenizer("chatml"), 512)
    with pytest.raises(RecordError, match=r"line 3: .* has no attribute 'content'\. Change"):
        chatml.encode(Chat((user("a"), assistant(None)), WHERE))


def test_no_template():
    with pytest.raises(ConfigError) as error:
        Encoder(tiny_tokenizer(), 512).encode(Chat(TALK, WHERE))
    assert str(error.value) == (
        "my.jsonl, line 3 is a chat, but the tokenizer of '' has no chat template that is used by "
        "default. Name a file with one, or take a model that was trained on chats (often named "
        "-Instruct or -it). (data.chat_template)"
    )


def test_half_an_emoji_in_what_only_the_template_reads():
    template = CHATML.replace("message['content']", "(message.thinking or '') + message['content']")
    assert f"{WHERE}, as the chat template writes it: character" in refusal(
        template, [user("Hello"), assistant("x", thinking="\ud83d")]
    )


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff\xfe")
    text = refusal(str(tmp_path / "model.safetensors"), TALK, error=ConfigError)
    assert text.startswith(f"{tmp_path / 'model.safetensors'}: cannot be read as a chat template, ")
    assert text.endswith("(data.chat_template)")


RUINOUS = {
    "a range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "a string": "{{ 'x' * 10 ** 15 }}",
    "a number": "{{ 10 ** 6000 }}",
    "a division": "{{ 1 // 0 }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a call of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "another's text": "{{ raise_exception('\x1b]52;c;aGk=\x07') }}",
}


@pytest.mark.parametrize("marked_turns", [False, True])
@pytest.mark.parametrize("code", RUINOUS.values(), ids=RUINOUS)
def test_a_template_without_end_names_the_record(code, marked_turns):
    turn = "{% generation %}{{ message.content }}{% endgeneration %}"
    whole = code + (marked(turn) if marked_turns else "{{ messages[0].content }}")
    text = refusal(whole, TALK)
    assert text.startswith(f"{WHERE}: the chat template refuses this chat: ")
    assert text.endswith("(data.chat_template)")
    assert "\x1b" not in text


COUNTING = {
    "loops in loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "two calls of itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}  # fmt: skip


@pytest.mark.parametrize("code", COUNTING.values(), ids=COUNTING)
def test_a_template_that_counts_without_end(code, monkeypatch):
    monkeypatch.setattr("lora_lightning.data.encoding.chat_template.LONGEST_RENDERING", 0.3)
    text = refusal(code + "{{ messages[0].content }}", TALK)
    assert text.startswith(f"{WHERE}: the chat template refuses this chat: what it computes is wit")
    assert "it did not end within 0.3 seconds" in text


@pytest.mark.parametrize("marked_turns", [False, True])
def test_a_template_that_writes_without_end(marked_turns, monkeypatch):
    monkeypatch.setattr("lora_lightning.data.encoding.chat_template.LONGEST_LINE", 1000)
    turn = "{% generation %}{{ message.content }}{% endgeneration %}"
    whole = "{{ 'x' * 2000 }}" + (marked(turn) if marked_turns else "{{ messages[0].content }}")
    text = refusal(whole, TALK)
    assert text.startswith(f"{WHERE}, as the chat template writes it: has 2,")
    assert text.endswith(
        "characters, and at most 1,000 are taken. Correct the template. (data.chat_template)"
    )
