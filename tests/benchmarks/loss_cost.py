"""What the loss of a language model costs in time and memory: in chunks, and from all scores.

    python tests/benchmarks/loss_cost.py
    python tests/benchmarks/loss_cost.py --vocabularies 32000 --learned 0.3 --threads 2

Head and loss alone, forward and backward, from hidden states (tokens, 512) of which some share is
learned; the head is frozen, as with LoRA. Beside the chunked loss of `CausalLM`: the plain one, as
transformers computes it (all tokens, scores in float32), and torch's `F.linear_cross_entropy` where
there is one.

Time: in each repetition every variant takes one step, in an order that rotates, and is divided by
the plain step of the same repetition; the median of these ratios is shown, and the quartiles. One
thread is measured in CPU time, which other processes on the machine change least.
Memory: the most that is allocated at once in a step (torch.profiler), without weight and inputs.
Errors: of the loss, relative, against float64.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_lightning.tasks.chunked_cross_entropy import head_loss
from lora_lightning.utilities.constants import IGNORE_INDEX

FEATURES = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(head(hidden).float(), labels, reduction="sum")


def chunked(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    learned = labels != IGNORE_INDEX
    return head_loss(head, hidden[learned], labels[learned])[0]


def of_torch(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    return functional.linear_cross_entropy(
        hidden, head.weight, labels, reduction="sum", options=nn.LinearCrossEntropyOptions()
    )


VARIANTS: dict[str, Callable[..., Tensor]] = {"plain": plain, "chunked": chunked}
if hasattr(functional, "linear_cross_entropy"):
    VARIANTS["F.linear_cross_entropy"] = of_torch


def step(variant: Callable[..., Tensor], inputs: tuple[Any, ...]) -> float:
    loss = variant(*inputs)
    loss.backward()
    inputs[1].grad = None
    return float(loss.detach())


def peak(variant: Callable[..., Tensor], inputs: tuple[Any, ...]) -> float:
    """Bytes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step(variant, inputs)
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def measure(vocabulary: int, dtype: torch.dtype, options: Any) -> None:
    torch.manual_seed(0)
    head = nn.Linear(FEATURES, vocabulary, bias=False).to(dtype).requires_grad_(False)
    hidden = torch.randn(options.tokens, FEATURES).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (options.tokens,))
    labels[torch.rand(options.tokens) >= options.learned] = IGNORE_INDEX
    inputs = head, hidden, labels
    clock = time.process_time if options.threads == 1 else time.perf_counter
    with torch.no_grad():
        exact = float(plain(head.double(), hidden.double(), labels))
    head.to(dtype)
    errors = {name: abs(step(VARIANTS[name], inputs) / exact - 1) for name in VARIANTS}
    memory = {name: peak(VARIANTS[name], inputs) for name in VARIANTS}
    ratios: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repetition in range(options.repetitions):
        seconds = {}
        order = list(VARIANTS)
        for name in order[repetition % len(order) :] + order[: repetition % len(order)]:
            start = clock()
            step(VARIANTS[name], inputs)
            seconds[name] = clock() - start
        for name in VARIANTS:
            ratios[name].append(seconds[name] / seconds["plain"])
    for name in VARIANTS:
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        print(
            f"{name:24} time {middle:.2f} ({low:.2f} to {high:.2f})   "
            f"peak {memory[name] / 1e6:7.0f} MB ({memory[name] / memory['plain']:.2f})   "
            f"error {errors[name]:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--learned", type=float, default=1.0, help="share of the tokens")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads; ", end="")
    print(f"{options.tokens} tokens, {options.learned:.0%} of them learned; plain = 1")
    for vocabulary in options.vocabularies:
        for name in options.dtypes:
            print(f"\nvocabulary {vocabulary:,}, {name}")
            measure(vocabulary, DTYPES[name], options)


if __name__ == "__main__":
    main()
