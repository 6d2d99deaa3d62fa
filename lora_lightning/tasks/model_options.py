"""How a task's network is built: precision, attention, quantisation, recomputation, compilation."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lora_lightning.errors import ConfigError, ModelError, did_you_mean
from lora_lightning.tasks.pretrained import load_pretrained, resolve_model_path

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "fp4", "int8"]

# Lightning's precisions that convert a module's weights, and those that autocast.
_WEIGHTS = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class ModelOptions:
    """What `PretrainedTask` documents; checked against each other before anything is loaded.

    Raises:
        ConfigError: Naming the option.

    """

    dtype: str | None = None
    attn_implementation: str | None = None
    quantize: str | None = None
    gradient_checkpointing: bool = False
    compile: bool | dict[str, Any] = False
    pretrained: bool = True
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, Dtype)
        _check_choice("quantize", self.quantize, Quantization)
        if self.quantize and not self.pretrained:
            raise ConfigError(
                f"quantize={self.quantize!r} rounds pretrained weights, and pretrained=false asks "
                "for random ones. Take one of the two out. (model.quantize, model.pretrained)"
            )
        missing = [name for name in _NEEDED if self.quantize and not _installed(name)]
        if missing:
            raise ConfigError(
                f"quantize={self.quantize!r} needs {' and '.join(missing)}. Install what is "
                'missing with: pip install "lora_lightning[quant]" (model.quantize)'
            )

    def hub(self) -> dict[str, Any]:
        """What every file of the model is asked for with, its tokenizer's as well."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {**revision, "trust_remote_code": self.trust_remote_code}

    def check_run(self, trainer: Any, adapters: bool) -> None:
        """Refuse a Trainer that these options cannot be had with.

        Args:
            trainer: The Trainer.
            adapters: Whether adapters train, and the network is frozen.

        Raises:
            ConfigError: Naming the option.

        """
        converted = _WEIGHTS.get(trainer.precision)
        if converted and self.dtype not in (None, converted):
            raise ConfigError(
                f"dtype={self.dtype!r} would have no effect: trainer.precision="
                f"{trainer.precision!r} turns all weights into {converted}. Leave one of the two "
                "out. (model.dtype, trainer.precision)"
            )
        if trainer.state.fn != "fit":
            return
        if self.quantize and not adapters:
            raise ConfigError(
                f"quantize={self.quantize!r} leaves weights that cannot be trained, and there are "
                "no adapters that could be in their place. Fine-tune with LoRA (a LoraCallback, "
                "lora.enabled), or take quantize out. (model.quantize)"
            )
        if not self.pretrained and adapters:
            raise ConfigError(
                "pretrained=false gives random weights, and adapters would leave them so: only the "
                "adapters train. Train the whole network (lora.enabled: false), or take "
                "pretrained=false out. (model.pretrained, lora.enabled)"
            )


def _check_choice(option: str, value: str | None, choices: Any) -> None:
    known = get_args(choices)
    if value is not None and value not in known:
        near = did_you_mean(value, known)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"{option}={value!r} is not known.{hint} Known are {', '.join(known)}. (model.{option})"
        )


_NEEDED = ("bitsandbytes", "accelerate")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def load_network(
    auto_class: str, name: str, options: ModelOptions, trainer: Any, **network_options: Any
) -> tuple[nn.Module, set[str]]:
    """The network in train mode, and the names of its parameters that no file had values for.

    Args:
        auto_class: Its class in transformers.
        name: The model's name.
        options: How it is built.
        trainer: The Trainer that it is for, whose precision and device count; may be None.
        **network_options: A task's own for `from_pretrained`.

    """
    if options.revision is not None and Path(resolve_model_path(name)).is_dir():
        raise ConfigError(
            f"revision={options.revision!r} names a state of a model on the hub, but {name!r} is a "
            "local folder, which has one state only. Leave it out. (model.revision)"
        )
    how: dict[str, Any] = {**options.hub(), **network_options, "dtype": _dtype(options)}
    if options.attn_implementation is not None:
        how["attn_implementation"] = options.attn_implementation
    network: Any
    if options.pretrained:
        if options.quantize:
            how |= _quantized(auto_class, name, options, trainer, how)
        with _attention_named(options.attn_implementation):
            network, info = load_pretrained(auto_class, name, output_loading_info=True, **how)
        new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    else:
        with _attention_named(options.attn_implementation):
            network, new = from_config(auto_class, name, how), set()
    network.train()  # from_pretrained returns eval mode, which the Trainer would keep
    # A cache is of no use but to generation, which asks for one by itself. Where there is one,
    # transformers takes a packed row for a single sequence, and checkpointing warns of it.
    network.config.use_cache = False
    if options.gradient_checkpointing:
        _checkpoint_layers(network, name)
    if options.compile:
        _compile(network, {} if options.compile is True else options.compile)
    return network, new


@contextmanager
def _attention_named(name: str | None) -> Iterator[None]:
    """Say that it is the attention where that is what transformers cannot have."""
    try:
        yield
    except (ModelError, ImportError, ValueError) as error:
        reason = str(error.__cause__ or error).split("\n")[0]
        if name is None or not re.search("attn_implementation|attention", reason, re.IGNORECASE):
            raise
        raise ConfigError(
            f"attn_implementation={name!r} cannot be had: {reason} (model.attn_implementation)"
        ) from error


def from_config(auto_class: str, name: str, how: dict[str, Any]) -> nn.Module:
    """The network with random weights, of the shape that its `config.json` says."""
    import transformers

    own = {"dtype", "attn_implementation", "trust_remote_code"}
    for_config = {k: v for k, v in how.items() if k not in own | {"ignore_mismatched_sizes"}}
    trust = {"trust_remote_code": how["trust_remote_code"]}
    config = load_pretrained("AutoConfig", name, **for_config, **trust)
    passed_on = {key: value for key, value in how.items() if key in own}
    if passed_on["dtype"] == "auto":
        passed_on["dtype"] = config.dtype or torch.get_default_dtype()
    return getattr(transformers, auto_class).from_config(config, **passed_on)


def _checkpoint_layers(network: Any, name: str) -> None:
    """Let every layer keep its input only, and run again in backward.

    Non-reentrant: a layer whose input needs no gradient, as below frozen embeddings, trains.
    """
    if not getattr(network, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{name!r} is a {type(network).__name__}, which does not support gradient "
            "checkpointing. (model.gradient_checkpointing)"
        )
    # Its name before transformers 5.20
    enable = getattr(network, "activation_checkpointing_enable", None)
    (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    # transformers lets embeddings require gradients for the reentrant kind, which breaks a graph.
    network.disable_input_require_grads()


def _compile(network: Any, options: dict[str, Any]) -> None:
    """Compile the base in place: no wrapper, so all names stay, and adapters may grow later.

    Heads stay outside: what computes a loss may call them in pieces.
    """
    network.base_model.compile(**{"dynamic": True, **options})


def _dtype(options: ModelOptions) -> Any:
    # By default that of the Trainer's precision, not the one that the file was saved in.
    if options.dtype is None:
        return torch.get_default_dtype()
    return "auto" if options.dtype == "auto" else getattr(torch, options.dtype)


def _quantized(
    auto_class: str, name: str, options: ModelOptions, trainer: Any, how: dict[str, Any]
) -> dict[str, Any]:
    """What makes `from_pretrained` round the Linears of the base."""
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        skeleton = from_config(auto_class, name, how)
    weights = next(skeleton.parameters()).dtype
    compute = _AUTOCAST.get(getattr(trainer, "precision", ""), weights)
    kind: dict[str, Any] = {"load_in_8bit": True}
    if options.quantize != "int8":
        kind = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": options.quantize,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute,
        }
    config = BitsAndBytesConfig(**kind, llm_int8_skip_modules=heads(skeleton))
    # Each process onto its own device, and never by way of another.
    place = {} if trainer is None else {"device_map": {"": trainer.strategy.root_device}}
    return {"quantization_config": config, **place}


def heads(network: Any) -> list[str]:
    """The paths of what stands on top of the pretrained base: it stays as precise as it is."""
    output = network.get_output_embeddings()  # None where there are none
    found = [path for path, module in network.named_modules() if module is output]
    if network.base_model is not network:
        children = network.named_children()
        found += [path for path, module in children if module is not network.base_model]
    return list(dict.fromkeys(found))
