"""Summed cross-entropy behind an output head, without ever holding all its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

Head = Callable[[Tensor], Tensor]
Chunks = list[tuple[Tensor, Tensor]]  # hidden states, labels
# Scores of one chunk on a CPU: 32 MiB in float32, where it is as fast as any (loss_cost.py).
CHUNK = 2**23
# Times as many on other devices, whose products want more rows for each time the weight is read.
ELSEWHERE = 4
_sized_for: ContextVar[str | None] = ContextVar("sized_for", default=None)


@contextmanager
def chunks_sized_for(kind: str) -> Iterator[None]:
    """Take chunks of the size for another kind of device, whose memory is being planned."""
    token = _sized_for.set(kind)
    try:
        yield
    finally:
        _sized_for.reset(token)


def head_loss(head: Head, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sum of -log softmax(head(hidden))[labels], in float32 (float64 where the scores are).

    A chunk's scores live only until its share of the gradients is known, which is computed along
    with the loss: of tokens x vocabulary nothing is held, neither forward nor backward, and nothing
    is computed twice. (torch 2.13's `F.linear_cross_entropy` does the same of a plain weight, but
    sums up in the dtype of its input: in bfloat16 the loss was 0.6 to 11 % off in
    tests/benchmarks/loss_cost.py.)

    Args:
        head: Scores (n, vocabulary) of hidden states (n, features). All tensors it reads get
            their gradients.
        hidden: (n, features), n at least 1.
        labels: (n), none of them to be ignored.

    Returns:
        The loss; and how many labels have the highest score, where no gradients are asked for.
    """
    one = head(hidden.detach()[:1])
    kind = _sized_for.get() or hidden.device.type
    numbers = CHUNK if kind == "cpu" else ELSEWHERE * CHUNK
    rows = max(1, numbers // one.shape[-1])
    chunks = list(zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True))
    leaves = _leaves(one)
    if torch.is_grad_enabled() and (leaves or hidden.requires_grad):
        apply: Callable[..., Tensor] = _HeadLoss.apply
        return apply(head, chunks, hidden, *leaves), None
    loss, correct = _zero(hidden), torch.zeros((), dtype=torch.long, device=hidden.device)
    for part, wanted in chunks:
        scores = widened(head(part))
        loss = loss + cross_entropy(scores, wanted, reduction="sum")
        correct = correct + (scores.argmax(dim=-1) == wanted).sum()
    return loss, correct


class _HeadLoss(torch.autograd.Function):
    """Gradients of a sum are known with it: only a factor is still to come."""

    @staticmethod
    def forward(ctx: Any, head: Head, chunks: Chunks, hidden: Tensor, *leaves: Tensor) -> Tensor:
        loss, place = _zero(hidden), 0
        own = torch.zeros_like(hidden) if hidden.requires_grad else None
        sums = [torch.zeros_like(t, dtype=_sum_dtype(t.dtype)) for t in leaves]
        for part, wanted in chunks:
            with torch.enable_grad():
                part = part.detach().requires_grad_(own is not None)
                scores = widened(head(part))
            logs = scores.detach().log_softmax(dim=-1)
            wanted = wanted.unsqueeze(-1)
            loss -= logs.gather(-1, wanted).sum()
            # The loss's gradient at the scores: softmax, less 1 at the label.
            slope = logs.exp_().scatter_add_(-1, wanted, -torch.ones_like(logs[:, :1]))
            inputs = [*leaves, part] if own is not None else [*leaves]
            gradients = list(torch.autograd.grad(scores, inputs, slope, materialize_grads=True))
            if own is not None:
                own[place : place + len(part)] = gradients.pop()
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
            place += len(part)
        ctx.gradients = [own, *sums]
        ctx.dtypes = [t.dtype for t in (hidden, *leaves)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # multiplied in place, so only once
        if gradients is None:
            raise RuntimeError("head_loss keeps its gradients for one backward pass only")
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (None, None, *(None if g is None else g.mul_(factor).to(d) for g, d in pairs))


def _leaves(scores: Tensor) -> list[Tensor]:
    """All tensors that train and were read, the head's or not (rows tied to an embedding)."""
    pending = [scores.grad_fn]
    found: dict[int, Tensor] = {}
    seen = set(pending)
    while pending:
        node: Any = pending.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):  # where gradients of a leaf are accumulated
            found[id(node.variable)] = node.variable
        fresh = {following for following, _ in node.next_functions} - seen
        seen |= fresh
        pending += fresh
    return list(found.values())


def widened(scores: Tensor) -> Tensor:
    """Scores in float32, or wider where they are."""
    return scores.to(_sum_dtype(scores.dtype))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _zero(hidden: Tensor) -> Tensor:
    return torch.zeros((), dtype=_sum_dtype(hidden.dtype), device=hidden.device)
