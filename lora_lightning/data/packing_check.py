"""Whether a network keeps packed examples apart: asked of the network itself, before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.rng import random_state_kept

# Tokens of the two sequences; longer than the window of no model in use.
LENGTHS = (6, 8)
# Of what the wrong answer is off by: half-precision numbers are within, all that mix are not.
TOLERANCE = 0.25


def transformers_network(module: nn.Module) -> Any:
    """The Hugging Face network in a module, the outermost; None where there is none."""
    from transformers import PreTrainedModel

    return next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)


def needs_one_row(network: Any) -> bool:
    """Whether attention keeps packed examples apart only where a batch is a single row."""
    return "flash" in (getattr(network.config, "_attn_implementation", None) or "")


def check_packing(trainer: Trainer) -> None:
    """Refuse to pack for a network in which packed examples would see each other.

    Two short random sequences go through it in one row, with positions that restart, and the second
    one alone. Its logits must be the same; what they would be if it saw the first is found by
    letting positions run on.

    Raises:
        ConfigError: If they are not.
    """
    module = trainer.lightning_module
    network = transformers_network(module)
    if network is None:
        rank_zero_warn(
            f"packing: there is no Hugging Face network in {type(module).__name__} to ask whether "
            "it keeps packed examples apart by their position_ids. Make sure that it does, or "
            "turn packing off. (data.packing)"
        )
        return
    with _as_in_inference(network), trainer.precision_plugin.val_step_context():
        apart, together, alone = _through_strategy(trainer, network)
    off, mixed = (float((logits - alone).abs().mean()) for logits in (apart, together))
    if not off <= TOLERANCE * mixed:
        raise ConfigError(
            f"packing: {type(network).__name__} (attention: {network.config._attn_implementation}) "
            "does not keep packed examples apart: what a token says depends on the example before "
            "it. Set packing: false, where batches hold examples of about equal length, or use "
            "another model or attention (model.attn_implementation). (data.packing)"
        )


def _through_strategy(trainer: Trainer, network: Any) -> list[Tensor]:
    """Logits of the second sequence: kept apart by positions, after the first one, and alone."""
    strategy, module = trainer.strategy, trainer.lightning_module
    first, second = LENGTHS
    vocabulary = network.get_input_embeddings().num_embeddings
    ids = torch.arange(1, first + second + 1).mul(7919).remainder(vocabulary)[None]
    running = torch.arange(first + second)[None]
    restarting = running.where(running < first, running - first)

    def probe() -> list[Tensor]:
        def logits(ids: Tensor, positions: Tensor) -> Tensor:
            ids, positions = ids.to(strategy.root_device), positions.to(strategy.root_device)
            said = network(input_ids=ids, position_ids=positions, use_cache=False).logits
            return said[0, -second:].float()

        return [
            logits(ids, restarting),
            logits(ids, running),
            logits(ids[:, first:], running[:, :second]),
        ]

    if strategy.model is module:
        return probe()
    # A wrapper such as FSDP's gathers weights only on the way through its own forward.
    module.__dict__["_packing_probe"] = probe
    try:
        redirect: Any = strategy._forward_redirection
        return redirect(strategy.model, module, "_packing_probe")
    finally:
        del module.__dict__["_packing_probe"]


@contextmanager
def _as_in_inference(network: nn.Module) -> Iterator[None]:
    """Without dropout, gradients, compilation or a trace in random numbers."""
    training = [m for m in network.modules() if m.training]
    network.eval()
    try:
        with random_state_kept(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
