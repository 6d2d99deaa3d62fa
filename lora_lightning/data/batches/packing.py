"""Packing: several examples in one row, and a check that a network keeps them apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.training._lightning import call_inside_wrapper
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.utilities.rng import random_state_kept

# Tokens of the two sequences; longer than the window of no model in use.
LENGTHS = (6, 8)
# What may change for rounding, of what a token of the same sequence changes: with another sequence
# before it, where only experts could compute in another order, and alone. In 16 bits below.
OTHER, ALONE = 1e-4, 1e-3
OTHER_16_BIT, ALONE_16_BIT = 1e-3, 5e-2


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows as is known to be cheap, each whole.

    The longest item first, each into the row with the least space that takes it (best-fit
    decreasing: never more than 11/9 of the fewest possible rows, plus one; D. S. Johnson, 1973).
    n log n.

    Returns the indices of the items of each row; none of `lengths` exceeds `capacity`.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = {}  # rows by the space that is left
    spaces: list[int] = []  # the keys of it, in order
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        place = bisect_left(spaces, lengths[index])
        if place == len(spaces):
            row: list[int] = []
            space = capacity
            rows.append(row)
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        row.append(index)
        left = space - lengths[index]
        if left not in with_space:
            with_space[left] = []
            insort(spaces, left)
        with_space[left].append(row)
    return rows


def transformers_network(module: nn.Module) -> Any:
    """The Hugging Face network in a module, the outermost; None where there is none."""
    from transformers import PreTrainedModel

    return next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)


def needs_one_row(network: Any) -> bool:
    """True if attention keeps packed examples apart only where a batch is a single row."""
    return "flash" in (getattr(network.config, "_attn_implementation", None) or "")


def check_packing(trainer: Trainer) -> None:
    """Refuse to pack for a network in which packed examples would see each other.

    Two short random sequences go through it in one row, with positions that restart. What it says
    of the second one must not change with the first, and must be what it says of it alone. By how
    much it may change for rounding is seen from what a token of the second one changes.

    Raises:
        ConfigError: If it does.
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
        packed, first_changed, alone, own_changed = _through_strategy(trainer, network)
    scale = _difference(packed, own_changed)
    other, apart = _difference(packed, first_changed), _difference(packed, alone)
    limits = (OTHER_16_BIT, ALONE_16_BIT) if _rounds(trainer, network) else (OTHER, ALONE)
    if not (other <= limits[0] * scale and apart <= limits[1] * scale):
        raise ConfigError(
            f"packing: {type(network).__name__} (attention: {network.config._attn_implementation}) "
            "does not keep packed examples apart: what a token says depends on the example before "
            "it. Set packing: false, where batches hold examples of about equal length, or use "
            "another model or attention (model.attn_implementation). (data.packing)"
        )


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().mean())


def _rounds(trainer: Trainer, network: nn.Module) -> bool:
    """True if it computes in 16 bits, or fewer."""
    wide = all(p.dtype in (torch.float32, torch.float64) for p in network.parameters())
    return not wide or "16" in str(trainer.precision)


def _through_strategy(trainer: Trainer, network: Any) -> list[Tensor]:
    """Logits of the second sequence.

    Behind the first; behind another; alone; and behind the first, but with another first token.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    first, second = LENGTHS
    vocabulary = network.get_input_embeddings().num_embeddings
    ids = torch.arange(1, first + second + 1).mul(7919).remainder(vocabulary)[None]
    positions = torch.cat([torch.arange(first), torch.arange(second)])[None]
    others = (ids + 1).remainder(vocabulary)
    first_changed = torch.cat([others[:, :first], ids[:, first:]], dim=1)
    own_changed = torch.cat([ids[:, :first], others[:, first : first + 1], ids[:, first + 1 :]], 1)
    alone = ids[:, first:], positions[:, first:]
    inputs = [(ids, positions), (first_changed, positions), alone, (own_changed, positions)]

    def probe() -> list[Tensor]:
        said = []
        for tokens, places in inputs:
            tokens, places = tokens.to(strategy.root_device), places.to(strategy.root_device)
            out = network(input_ids=tokens, position_ids=places, use_cache=False)
            said.append(out.logits[0, -second:].float())
        return said

    if strategy.model is module:
        return probe()
    # A wrapper such as FSDP's gathers weights only on the way through its own forward.
    module.__dict__["_packing_probe"] = probe
    try:
        said: list[Tensor] = call_inside_wrapper(strategy, module, "_packing_probe")
        return said
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
