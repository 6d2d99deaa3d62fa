"""The one safetensors file that `load_lora_weights` of diffusers' pipelines reads.

A tensor is called `<component of the pipeline>.<path of the module>.lora_A.weight`. The rank is
that of `lora_B` and, as the file says nothing else, alpha is the rank: so the scale is 1. All ranks
are the same, since of mixed ones diffusers takes the most frequent as everybody's alpha
(huggingface/diffusers#14409).
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lora_lightning.checkpoint.peft.base_model import is_pretrained, plain_class, pretrained_inside
from lora_lightning.errors import ConfigError, first_few
from lora_lightning.utilities.is_a import is_a
from lora_lightning.verbs.export.plain import plain_lora

FILE = "pytorch_lora_weights.safetensors"  # where load_lora_weights(folder) looks
# Attributes of pipelines that take adapters.
_COMPONENTS = (
    "unet", "transformer", "transformer_2", "prior", "text_encoder", "text_encoder_2",
    "text_encoder_3", "controlnet",
)  # fmt: skip


def write_diffusers(model: nn.Module, folder: Path, adapter_name: str) -> None:
    """Write an adapter on the models of a pipeline, which lie in `model`.

    Raises:
        ConfigError: If it is more than plain LoRA, or on modules that are in no such model.

    """
    plain = plain_lora(model, adapter_name, "diffusers")
    components = _components(model)
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in plain.pairs.items():
        prefix = next((prefix for prefix in components if f"{path}.".startswith(prefix)), None)
        if prefix is None:
            raise ConfigError(
                f"Adapter {adapter_name!r} cannot be had as --format diffusers: {path} lies in no "
                "model of a pipeline (a UNet, a transformer or a text encoder of diffusers or "
                "transformers). Take --format peft, or portable for a language model. (format)"
            )
        name = f"{components[prefix]}.{path.removeprefix(prefix)}"
        tensors |= {f"{name}.lora_A.weight": a.cpu(), f"{name}.lora_B.weight": b.cpu()}
    content = to_safetensors(dict(sorted(tensors.items())), metadata={"format": "pt"})
    (folder / FILE).write_bytes(content)


def _components(model: nn.Module) -> dict[str, str]:
    """What a pipeline calls the pretrained models in `model`, by what stands before their paths."""
    inside = {target.prefix: target.model for target in pretrained_inside(model)}
    if is_pretrained(model):
        inside = {"": model}
    found = {
        prefix: name
        for prefix, part in inside.items()
        if (name := _component(prefix, part)) is not None
    }
    if len(set(found.values())) < len(found):
        raise ConfigError(
            f"{first_few(found)} are of one kind, and only a pipeline's own names tell them apart: "
            f"call these attributes as it does ({', '.join(_COMPONENTS)}). (format)"
        )
    return found


def _component(prefix: str, model: nn.Module) -> str | None:
    """By its attribute's name, or else by its class."""
    attribute = prefix.rstrip(".").rpartition(".")[2]
    if attribute in _COMPONENTS:
        return attribute
    kind = plain_class(model).__name__
    if is_a(model, "ModelMixin", module="diffusers.models.modeling_utils"):
        return "unet" if "UNet" in kind else "transformer" if "Transformer" in kind else None
    return "text_encoder" if kind.startswith("CLIPText") else None
