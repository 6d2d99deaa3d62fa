"""Adapter types, one file each."""

from lora_lightning.adapters.lora import LoraAdapter, LoraEmbeddingAdapter

# Which class adapts which kind of host (`Host.kind`).
LORA_BY_KIND = {"linear": LoraAdapter, "embedding": LoraEmbeddingAdapter}
