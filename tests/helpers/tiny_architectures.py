"""Architectures of transformers with two layers of width 16 and random weights, made by their config.

`shrink` knows the words that configs have in common; what one of them needs beside it stands in
`EXCEPTIONS`. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

# What the sizes are called, and their tiny values.
SIZES: dict[int, tuple[str, ...]] = {
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
        "decoder_layers", "num_encoder_layers", "num_decoder_layers", "num_attention_heads",
        "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_key_value_heads", "num_kv_heads", "n_head_kv", "num_experts_per_tok", "patch_size",
        "num_mel_bins", "num_conv_pos_embedding_groups", "num_hidden_groups",
    ),
    4: (
        "num_local_experts", "num_experts", "n_routed_experts", "num_buckets",
        "num_conv_pos_embeddings",
    ),
    8: (
        "head_dim", "d_kv", "embedding_size", "kv_lora_rank", "qk_rope_head_dim",
        "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "max_source_positions", "image_size",
        "state_size", "time_step_rank", "conv_dim",
    ),
    16: (
        "hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "projection_dim",
        "d_embed", "decoder_hidden_size", "output_size", "moe_intermediate_size",
        "shared_expert_intermediate_size", "lru_width",
    ),
    32: (
        "intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim",
        "hidden_dim", "ffn_hidden_size",
    ),
    64: (
        "vocab_size", "max_position_embeddings", "n_positions", "max_target_positions",
        "n_ctx",
    ),
}  # fmt: skip
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")

# The same, of lists with a value for each stage.
LISTS: dict[int, tuple[str, ...]] = {
    1: ("depths",),
    2: ("num_attention_heads", "num_heads"),
    8: ("conv_dim",),
    16: ("hidden_sizes", "embed_dim", "neck_hidden_sizes"),
}
# What a config needs beside it.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 2, "embedding_size": 16},
    "clip": {"projection_dim": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "esm": {"vocab_size": 64, "pad_token_id": 0, "mask_token_id": 1},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4, "n_head": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "mobilebert": {"true_hidden_size": 16, "intra_bottleneck_size": 16, "embedding_size": 16},
    "resnet": {"embedding_size": 16},
    "squeezebert": {"embedding_size": 16},
    "xlnet": {"d_inner": 32},
}


def shrink(config: Any, model_type: str | None = None) -> Any:
    """Set every size that is larger than the tiny one; those of inner configs, too."""
    for size, names in SIZES.items():
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > size:
                _set(config, name, size)
    for size, names in LISTS.items():
        for name in names:
            if isinstance(values := getattr(config, name, None), (list, tuple)):
                setattr(config, name, [min(value, size) for value in values])
    for index, name in enumerate(TOKENS):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= 64:
            setattr(config, name, index)
    for name in type(config).sub_configs:
        if getattr(config, name, None) is not None:
            shrink(getattr(config, name))
    for name, value in EXCEPTIONS.get(model_type or "", {}).items():
        setattr(config, name, value)
    return config


def _set(config: Any, name: str, value: int) -> None:
    with contextlib.suppress(AttributeError, NotImplementedError):  # computed from others
        setattr(config, name, value)


def tiny(model_type: str, auto_class: str = "AutoModel") -> nn.Module:
    """The architecture in eval mode."""
    import transformers

    config = shrink(transformers.AutoConfig.for_model(model_type), model_type)
    torch.manual_seed(0)
    return getattr(transformers, auto_class).from_config(config).eval()


def example_inputs(model: Any) -> dict[str, Tensor]:
    """A batch of two, as the model's main input says."""
    torch.manual_seed(1)
    config, name = model.config, model.main_input_name
    ids = torch.randint(5, 60, (2, 7))
    pixels = {"pixel_values": torch.randn(2, 3, *[image_size(config)] * 2)}
    if model.config.model_type == "clip":
        return {"input_ids": ids, **pixels, "attention_mask": torch.ones_like(ids)}
    if name == "pixel_values":
        return pixels
    if name == "input_values":  # waves, or spectra
        spectrum = getattr(config, "num_mel_bins", None)
        size = (config.max_length, spectrum) if spectrum else (800,)
        return {name: torch.randn(2, *size)}
    inputs = {name: ids}
    if name == "input_features":
        inputs = {name: torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, 60, (2, 6))
    return inputs


def image_size(config: Any) -> int:
    """The side of an image; convolutional networks take any."""
    size = getattr(config, "image_size", None) or getattr(config, "vision_config", None)
    return int(size if isinstance(size, int) else getattr(size, "image_size", 32))
