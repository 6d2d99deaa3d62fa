"""A random BERT of a few thousand weights and its word tokenizer, saved as transformers does."""

from pathlib import Path

WORDS = ["good", "bad", "fine", "awful", "red", "green", "film", "book"]
WORDS += ["the", "a", "was", "very", "not"]


def save_tiny_bert(folder: Path, head_labels: int | None = None) -> Path:
    """Write config, weights and tokenizer; with a trained head where `head_labels` is given."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        PreTrainedTokenizerFast,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=head_labels or 2,
        initializer_range=0.05,  # with 0.02 so narrow a network stays mute for epochs
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config) if head_labels else BertModel(config)
    model.save_pretrained(folder)
    return folder
