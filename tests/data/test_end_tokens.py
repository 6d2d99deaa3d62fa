"""With which tokens data teach a model to stop: those that the template's own text says."""

from __future__ import annotations

from typing import Any

import pytest

from lora_lightning.data.encoding.causal_lm import Encoder
from lora_lightning.data.encoding.chat_labels import ChatTurns, template_end_tokens
from lora_lightning.data.samples.sample import Chat, Document, PromptCompletion
from tests.helpers.taught_lm import OTHER_EOS, TURN_ENDS
from tests.helpers.tiny_lm import CHATML, STYLES, tiny_tokenizer

ASKED = {"role": "user", "content": "Hello"}
SAID = {"role": "assistant", "content": "Paris"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "capital", "arguments": {}}}],
}


def in_text(tokenizer: Any, chat: list[dict[str, Any]]) -> list[int]:
    """The first special token behind what is said, by the tokenizer alone."""
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    behind = text.rpartition(chat[-1]["content"])[2]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return [next(i for i in ids if i in added and added[i].special)]


def ended(tokenizer: Any, *samples: Any) -> list[str]:
    encoder = Encoder(tokenizer, 99)
    encoder.encode_block(samples)
    return tokenizer.convert_ids_to_tokens(encoder.end_tokens)


def with_template(template: str, *special: str, **options: Any) -> Any:
    return tiny_tokenizer(template, eos="</s>", special=special, **options)


@pytest.mark.parametrize("other_eos", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_the_end_is_that_of_the_templates_text(style: str, other_eos: bool) -> None:
    tokenizer = tiny_tokenizer(style)
    if other_eos:
        tokenizer.eos_token = OTHER_EOS[style]
    encoder = Encoder(tokenizer, 99)
    encoder.encode(Chat((ASKED, SAID), "row"))
    assert encoder.end_tokens == in_text(tokenizer, [ASKED, SAID])
    assert encoder.end_tokens == template_end_tokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoder.end_tokens) == [TURN_ENDS[style]]


def test_the_first_of_several_tokens_ends_a_turn() -> None:
    """Phi-3's template puts the end of sequence behind the last turn."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    )
    names = [f"<|{name}|>" for name in ("user", "assistant", "end")]
    tokenizer = with_template(template, *names)
    assert ended(tokenizer, Chat((ASKED, SAID), "row")) == ["<|end|>"]
    assert in_text(tokenizer, [ASKED, SAID]) == tokenizer.convert_tokens_to_ids(["<|end|>"])


def test_the_end_of_a_tool_call_is_not_that_of_a_turn() -> None:
    body = (
        "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
        "<|call_begin|>{{ call.function.name }}<|call_end|>{% endfor %}"
    )
    template = CHATML.replace("{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}", "{{ '<|im_start|>' + message['role'] + '\\n' }}" + body + "{{ '<|im_end|>\\n' }}")  # fmt: skip
    assert body in template
    special = ("<|im_start|>", "<|im_end|>", "<|call_begin|>", "<|call_end|>")
    tokenizer = with_template(template, *special)
    assert ended(tokenizer, Chat((ASKED, CALL), "row")) == ["<|im_end|>"]


def test_calls_and_words_may_end_in_tokens_of_their_own() -> None:
    """Llama 3.1 ends a message that goes on after a call with another token."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|eom|>{% else %}<|eot|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = with_template(template, "<|user|>", "<|assistant|>", "<|eom|>", "<|eot|>")
    chats = Chat((ASKED, CALL), "row"), Chat((ASKED, SAID), "row")
    assert ended(tokenizer, chats[0]) == ["<|eom|>"]
    assert sorted(ended(tokenizer, *chats)) == ["<|eom|>", "<|eot|>"]


def test_texts_end_in_the_end_of_sequence() -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.eos_token = "<|endoftext|>"
    assert ended(tokenizer, Document("Once upon a time", "row")) == ["<|endoftext|>"]
    assert ended(tokenizer, PromptCompletion("Question:", "five", "row")) == ["<|endoftext|>"]
    both = ended(tokenizer, Document("Once", "row"), Chat((ASKED, SAID), "row"))
    assert sorted(both) == ["<|endoftext|>", "<|im_end|>"]
    assert ended(tokenizer) == []  # nothing was encoded


def test_a_template_without_end() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = with_template(template)
    assert ended(tokenizer, Chat((ASKED, SAID), "row")) == []
    assert template_end_tokens(tokenizer) == []
    assert template_end_tokens(tiny_tokenizer()) == []
    assert template_end_tokens(with_template("{{ raise_exception('no') }}")) == []


def test_the_last_added_token_would_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before: it would let Phi-3's model run on behind its answers."""
    monkeypatch.setattr(ChatTurns, "_end_token", lambda self, body: body.rstrip()[-4:])
    with pytest.raises(AssertionError):
        test_the_first_of_several_tokens_ends_a_turn()
