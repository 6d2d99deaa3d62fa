"""Random causal LMs of a few thousand weights, and tokenizers built in memory.

The chat templates write the turns of three public formats (ChatML as Qwen's, Llama 3's, Gemma's)
with those models' real special tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORPUS = """Hello world! How are you today? I am fine, thank you. What is the capital of France?
Paris is the capital of France. You are a helpful assistant. The quick brown fox jumps over the
lazy dog. One two three four five six seven eight nine ten. What is two plus three? It is five.
system user assistant model tool Answer the question. Question: Answer: Once upon a time there was
a little girl and a big dog. They played in the garden all day."""
# Words beside blanks, at the start of a line, and breaks as they end a prompt.
TRAINING = [CORPUS, *CORPUS.split(), *["\n\n", "\t\t"] * 9]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


# For texts that need no sense.
PLAIN_WORDS = [
    "the",
    "a",
    "red",
    "old",
    "small",
    "house",
    "garden",
    "river",
    "stands",
    "lies",
    "near",
    "far",
    "from",
    "behind",
    "and",
    "it",
    "is",
]

# What a merge never crosses.
SPLITS = {
    "gpt2": r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@dataclass(frozen=True)
class Style:
    """One public format: its special tokens, its template, and how text becomes tokens."""

    template: str
    eos: str
    pad: str
    bos: str | None = None  # the tokenizer puts it before every text
    special: tuple[str, ...] = ()
    manner: str = "llama3"


STYLES = {
    "chatml": Style(CHATML, "<|im_end|>", "<|endoftext|>", special=("<|im_start|>",)),
    "llama3": Style(
        LLAMA3,
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        "<|begin_of_text|>",
        ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    ),
    "gemma": Style(
        GEMMA, "<eos>", "<pad>", "<bos>", ("<start_of_turn>", "<end_of_turn>"), "sentencepiece"
    ),
}


def tiny_tokenizer(
    template: str | None = None,
    *,
    bos: str | None = None,
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    special: tuple[str, ...] = (),
    manner: str = "gpt2",
    vocab_size: int = 640,
) -> Any:
    """A fast tokenizer (BPE) that knows every character, and the words of `CORPUS` as tokens.

    Args:
        template: "chatml", "llama3" or "gemma", which also set all other arguments; a chat template
            in Jinja; or None for a tokenizer without one.
        bos: Put before every text.
        eos: Not put after it. May be None.
        pad: May be None.
        special: Further special tokens.
        manner: How text is split: "gpt2" (bytes; "\\n\\n" is one token at the end of a text and two
            before a word), "llama3" (bytes; "\\n\\n" is always one, as with Qwen),
            "sentencepiece" (a blank is "▁", rare characters are bytes, as Gemma's), or
            "sentencepiece-prefix" (puts a blank before every text, as Llama 2's).
        vocab_size: At least 256 bytes and the special tokens.
    """
    from transformers import PreTrainedTokenizerFast

    if template in STYLES:
        style = STYLES[template]
        bos, eos, pad, special = style.bos, style.eos, style.pad, style.special
        template, manner = style.template, style.manner
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    named = {name: token for name, token in named.items() if token is not None}
    tokens = [*dict.fromkeys([*named.values(), *special])]
    if manner.startswith("sentencepiece"):
        bpe = _sentencepiece_bpe(tokens, bos, vocab_size, prefix=manner.endswith("prefix"))
    else:
        bpe = _byte_bpe(tokens, bos, vocab_size, SPLITS[manner])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **named,
        extra_special_tokens=list(special),
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(folder: Path, template: str | None = None, **config: Any) -> Path:
    """A random Llama and its tokenizer as a Hugging Face folder.

    Args:
        folder: Where they are written.
        template: As for `tiny_tokenizer`.
        **config: Options of LlamaConfig.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(template)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # with 0.02 so narrow a network says nearly nothing
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**{**options, **config})).save_pretrained(folder)
    return folder


def _byte_bpe(special: list[str], bos: str | None, vocab_size: int, words: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TRAINING, trainer)
    offsets = processors.ByteLevel(trim_offsets=True)
    if bos is None:
        bpe.post_processor = offsets
    else:
        bpe.post_processor = processors.Sequence([offsets, _bos_first(bpe, bos)])
    return bpe


def _sentencepiece_bpe(special: list[str], bos: str | None, vocab_size: int, prefix: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trained.train_from_iterator(TRAINING, trainer)
    # To the trainer the bytes are special tokens; in a model of this kind they are not.
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    bpe = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True))
    bpe.add_special_tokens(special)
    blank, no_prefix = normalizers.Replace(" ", "▁"), decoders.Strip(" ", 1, 0)
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if prefix else blank
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*steps, no_prefix] if prefix else steps)
    if bos is not None:
        bpe.post_processor = _bos_first(bpe, bos)
    return bpe


def _bos_first(bpe: Any, bos: str) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
