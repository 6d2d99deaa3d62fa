"""Build a task's network: loaded or random, quantized, compiled, sharded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from lora_lightning.errors import ConfigError, ModelError
from lora_lightning.layers.quantized.bitsandbytes import settle_rounding_table
from lora_lightning.tasks.model_options import ModelOptions, weights_of
from lora_lightning.tasks.sharding import repeated_layers, shard
from lora_lightning.utilities.hub import load_pretrained, resolve_model_path

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def build_network(
    auto_class: str,
    name: str,
    options: ModelOptions,
    trainer: Trainer | None = None,
    mesh: DeviceMesh | None = None,
    **network_options: Any,
) -> tuple[Any, set[str]]:
    """The network in train mode, and the names of its parameters that no file had values for.

    Of `trainer`, precision and device count. `mesh`: the processes that the network is shared out
    over; None: each has all of it. `network_options`: a task's own for `from_pretrained`.
    """
    if options.revision is not None and Path(resolve_model_path(name)).is_dir():
        raise ConfigError(
            f"revision={options.revision!r} names a state of a model on the hub, but {name!r} is a "
            "local folder, which has one state only. Leave it out. (model.revision)"
        )
    how = _how(options, network_options)
    if options.quantize:
        how |= _quantized(auto_class, name, options, trainer, how)

    def load() -> tuple[Any, set[str]]:
        if not options.pretrained:
            return _from_config(auto_class, name, how), set()
        network, new = _loaded(auto_class, name, how)
        if options.quantize:
            skipped = how["quantization_config"].llm_int8_skip_modules
            precise = tuple(f"{path}." for path in skipped)
            rounded = {key.rpartition(".")[0] for key in new if not key.startswith(precise)}
            if rounded:  # though no file has values for them, and they are to train
                skipped += sorted(rounded)
                network, new = _loaded(auto_class, name, how)
        return network, new

    new: set[str] = set()
    with _attention_named(options.attn_implementation):
        if mesh is None:
            network, new = load()
        else:
            network = _skeleton(auto_class, name, how)
    _settle(network, name, options)
    if options.compile is not False:
        # FSDP acts between layers.
        parts = _below_head(network) if mesh is None else repeated_layers(network)
        _compile(parts, {} if options.compile is True else options.compile)
    if mesh is not None:
        assert trainer is not None, "a strategy gives the mesh"
        new = shard(load, network, mesh, trainer.strategy.root_device)
    return network, new


def network_skeleton(
    auto_class: str,
    name: str,
    options: ModelOptions,
    precision: str | None = None,
    **network_options: Any,
) -> Any:
    """The network that `build_network` loads, unquantized and on the meta device: no values.

    `precision`: the Trainer's, where it is not that of the moment.
    """
    how = _how(options, network_options)
    cast = weights_of(precision)
    if options.dtype is None and cast is not None:
        how["dtype"] = cast
    with _attention_named(options.attn_implementation):
        return _skeleton(auto_class, name, how)


def settle_skeleton(network: Any, name: str, options: ModelOptions, precision: str) -> Any:
    """Make of `network_skeleton` what `build_network` makes of loaded weights.

    Layers that are to be quantized are bitsandbytes', with weights that are not yet rounded.
    """
    if options.quantize:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        found = next(network.parameters()).dtype
        config = _bitsandbytes(options.quantize, _AUTOCAST.get(precision, found), network)
        default = torch.get_default_dtype()
        torch.set_default_dtype(found)
        try:
            precise = [*config.llm_int8_skip_modules, *(network._keep_in_fp32_modules or ())]
            network = replace_with_bnb_linear(network, precise, config)
        finally:
            torch.set_default_dtype(default)
    cast = weights_of(precision)
    if cast is not None:
        network.to(cast)  # buffers, too
    _settle(network, name, options)
    return network


def head_parameters(network: Any) -> list[str]:
    """Parameters that no file has values for, as far as the config says of what network it is."""
    if type(network).__name__ in (network.config.architectures or [type(network).__name__]):
        return []
    heads = tuple(f"{path}." for path in _heads(network))
    return [name for name, _ in network.named_parameters() if name.startswith(heads)]


def _how(options: ModelOptions, network_options: dict[str, Any]) -> dict[str, Any]:
    how = {**options.hub(), **network_options, "dtype": _dtype(options)}
    if options.attn_implementation is not None:
        how["attn_implementation"] = options.attn_implementation
    return how


def _settle(network: Any, name: str, options: ModelOptions) -> None:
    network.train()  # from_pretrained returns eval mode, which the Trainer would keep
    # A cache is of no use but to generation, which asks for one by itself. Where there is one,
    # transformers takes a packed row for a single sequence, and checkpointing warns of it.
    network.config.use_cache = False
    if options.gradient_checkpointing:
        _checkpoint_layers(network, name)


def _loaded(auto_class: str, name: str, how: dict[str, Any]) -> tuple[Any, set[str]]:
    """The network, and the names of its parameters that no file had values for."""
    network, info = load_pretrained(auto_class, name, output_loading_info=True, **how)
    return network, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


@contextmanager
def _attention_named(name: str | None) -> Iterator[None]:
    """Name the option where transformers cannot have the attention."""
    try:
        yield
    except (ModelError, ImportError, ValueError) as error:
        reason = str(error.__cause__ or error).split("\n")[0]
        if name is None or not re.search("attn_implementation|attention", reason, re.IGNORECASE):
            raise
        raise ConfigError(
            f"attn_implementation={name!r} cannot be had: {reason} (model.attn_implementation)"
        ) from error


def _skeleton(auto_class: str, name: str, how: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return _from_config(auto_class, name, how)


def _from_config(auto_class: str, name: str, how: dict[str, Any]) -> Any:
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
    """Keep only each layer's input for backward, where the layer runs again.

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
    if getattr(network, "_require_grads_hook", None) is not None:
        network.disable_input_require_grads()


def _compile(parts: list[nn.Module], options: dict[str, Any]) -> None:
    """Compile in place: no wrapper, so names stay, and adapters may be attached later."""
    for part in parts:
        try:
            part.compile(**{"dynamic": True, **options})
        except (TypeError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise ConfigError(
                f"compile={options}: torch.compile cannot be given that: {reason} (model.compile)"
            ) from error


def _below_head(network: Any) -> list[nn.Module]:
    """Parts of a network below its heads, which a loss may call in chunks."""
    if network.base_model is not network:
        return [network.base_model]
    return [child for child in network.children() if repeated_layers(child)]  # T5's two stacks


def _dtype(options: ModelOptions) -> torch.dtype | str:
    # By default that of the Trainer's precision, not the one that the file was saved in.
    if options.dtype is None:
        return torch.get_default_dtype()
    return "auto" if options.dtype == "auto" else getattr(torch, options.dtype)


def _quantized(
    auto_class: str, name: str, options: ModelOptions, trainer: Trainer | None, how: dict[str, Any]
) -> dict[str, Any]:
    """Options with which `from_pretrained` quantizes the Linears of the base."""
    skeleton = _skeleton(auto_class, name, how)
    weights = next(skeleton.parameters()).dtype
    compute = _AUTOCAST.get(getattr(trainer, "precision", ""), weights)
    assert options.quantize is not None, "there is something to round to"
    config = _bitsandbytes(options.quantize, compute, skeleton)
    # Each process onto its own device, and never by way of another.
    place = {} if trainer is None else {"device_map": {"": trainer.strategy.root_device}}
    return {"quantization_config": config, **place}


def _bitsandbytes(quantize: str, compute: torch.dtype, network: Any) -> Any:
    from transformers import BitsAndBytesConfig

    kind: dict[str, Any] = {"load_in_8bit": True}
    if quantize != "int8":
        settle_rounding_table(quantize)
        kind = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantize,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute,
        }
    return BitsAndBytesConfig(**kind, llm_int8_skip_modules=_heads(network))


def _heads(network: Any) -> list[str]:
    """The paths of what stands on top of the pretrained base: it stays as precise as it is."""
    output = network.get_output_embeddings()  # None where there are none
    found = [path for path, module in network.named_modules() if module is output]
    if network.base_model is not network:
        children = network.named_children()
        found += [path for path, module in children if module is not network.base_model]
    return list(dict.fromkeys(found))
