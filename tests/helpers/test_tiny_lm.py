"""The helpers of `tiny_lm.py` behave as the models that they stand for."""

import pytest

from tests.helpers.tiny_lm import STYLES, tiny_llama, tiny_tokenizer

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am fine."}]
RENDERED = {
    "chatml": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nI am fine.<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nI am fine.<|eot_id|>",
    "gemma": "<bos><start_of_turn>user\nHello<end_of_turn>\n"
    "<start_of_turn>model\nI am fine.<end_of_turn>\n",
}


@pytest.mark.parametrize("style", STYLES)
def test_templates(style):
    tokenizer = tiny_tokenizer(style)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == RENDERED[style]
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.bos_token is None or tokenizer("a").input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("manner", ["gpt2", "llama3", "sentencepiece", "sentencepiece-prefix"])
def test_every_character_has_tokens(manner):
    tokenizer = tiny_tokenizer(manner=manner)
    for text in ("Hello world", "  two  blanks ", "naïve 日本 🙂\n\t{}"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_manners_differ_as_their_models_do():
    def tokens(manner, text):
        return tiny_tokenizer(manner=manner).tokenize(text)

    assert tokens("gpt2", "Question:\n\n")[-1] == "ĊĊ"
    assert tokens("gpt2", "Question:\n\nHello")[1:4] == [":", "Ċ", "Ċ"]
    assert tokens("llama3", "Question:\n\nHello")[1:3] == [":", "ĊĊ"]
    assert tokens("sentencepiece", "Hello")[0] != "▁"
    assert tokens("sentencepiece-prefix", "Hello")[0][0] == "▁"


def test_a_folder_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_llama(tmp_path, "llama3", num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 1
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED["llama3"]
    assert model(**tokenizer("Hello", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
