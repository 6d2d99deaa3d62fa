"""What a module's class makes of its weight, where its forward is not torch's.

A subclass of `nn.Conv2d` may pad by itself, which is still the product of input and weight; or
standardise its weight, or answer by an activation. A subclass of `nn.Embedding` may not even take
ids, and one of `nn.Linear` may answer by halves. Names do not tell, so the forward is tried: on a
copy of the module with random weights, so that nothing of the module is touched.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from lora_lightning.adapters.base import AdapterDict
from lora_lightning.layers.covered import covered
from lora_lightning.layers.parametrized import value
from lora_lightning.utilities.autocast import without_autocast

_CLOSE = 1e-4  # relative, in float32: rounding is 1e-6, and a slip above it is no slip of rounding
_POINTWISE = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def has_own_forward(base_type: type[nn.Module], torch_type: type[nn.Module]) -> bool:
    """Tell whether a class computes by code of its own, not by that of `torch_type`."""
    names = ("forward", "_conv_forward")  # the second: what a convolution's forward calls
    return any(getattr(base_type, n, None) is not getattr(torch_type, n, None) for n in names)


def is_linear_in_kernel(module: nn.Module) -> bool:
    """Tell whether a convolution's forward is that of torch's but for what it does to its input.

    Then it is y = (W * x) + b with the kernel W in the module's own geometry, for kernels to any
    number of channels: what W + B A adds is B (A * x), with groups, too.
    """
    conv = cast(nn.Conv2d, module)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    def holds() -> bool:
        out, each, *kernel = value(conv, "weight").shape
        groups, ones = conv.in_channels // each, [1 for _ in kernel]
        trial = _bare_copy(conv, random(out, each, *kernel), random(out))
        dilation = conv.dilation
        sizes = [2 * d * (k - 1) + 5 for d, k in zip(dilation, kernel, strict=True)]
        x = torch.randn(2, conv.in_channels, *sizes, generator=generator)
        # One channel for each group, made from its inputs alone, so that B A is a grouped kernel.
        small, b = random(groups, each, *kernel), random(out, 1, *ones)
        a = torch.block_diag(*small.flatten(1)).view(groups, conv.in_channels, *kernel)
        delta = b * small.repeat_interleave(out // groups, 0)
        y = run_with(trial, x, {})
        without_bias = run_with(trial, x, {"bias": None})
        sum_of_both = run_with(trial, x, {"weight": trial.weight + delta})
        hidden = run_with(trial, x, kernel_in_place(a, conv.in_channels))
        update = _POINTWISE[len(kernel)](hidden, b, groups=groups)
        bias = torch.zeros(()) if trial.bias is None else trial.bias.view(-1, *ones)
        return is_close(sum_of_both - y, update) and is_close(y, without_bias + bias)

    return _tried(holds)


def makes_the_same(conv: nn.Conv2d, base_type: type[nn.Module]) -> bool:
    """Tell whether new modules of a convolution's class, made as PEFT makes A and B, compute B A.

    Its class may know more than torch's arguments tell: that it pads so as to keep the size, say.
    """
    out, each, *kernel = value(conv, "weight").shape
    groups, ones = conv.in_channels // each, (1,) * len(kernel)
    make = cast("Callable[..., Any]", base_type)

    def holds() -> bool:
        size, options = conv.kernel_size, (conv.stride, conv.padding)
        first = make(conv.in_channels, groups, size, *options, bias=False).eval().float().cpu()
        second = make(groups, out, ones, ones, groups=groups, bias=False).eval().float().cpu()
        sizes = [2 * (k - 1) + 5 for k in kernel]
        x = torch.randn(2, conv.in_channels, *sizes, generator=torch.Generator().manual_seed(0))
        a, b = first.weight, second.weight
        trial = _bare_copy(conv, torch.empty(out, each, *kernel), torch.empty(out))
        with covered(trial, kernel_in_place(a, conv.in_channels)):
            hidden = base_type.forward(trial, x)
        return is_close(second(first(x)), _POINTWISE[len(kernel)](hidden, b, groups=groups))

    return _tried(holds)


def is_lookup(module: nn.Module) -> bool:
    """Tell whether a table's forward is E[ids], times `embed_scale` where it has one.

    Where it takes more than ids it may do something else, when it is asked to (decode, say).
    """
    table = cast(nn.Embedding, module)
    taken = list(inspect.signature(type(module).forward).parameters.values())[2:]
    if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in taken):
        return False

    def holds() -> bool:
        generator = torch.Generator().manual_seed(0)
        count, width = table.num_embeddings, 3  # narrow: a vocabulary is long
        trial = _bare_copy(table, torch.randn(count, width, generator=generator), None)
        trial.embedding_dim = width
        ids = torch.randint(count, (2, 5), generator=generator)
        rows = trial.weight[ids] * getattr(trial, "embed_scale", 1.0)
        return is_close(run_with(trial, ids, {}), rows)

    return _tried(holds)


def answers_by_rows(module: nn.Module) -> bool:
    """Tell whether a Linear's forward answers (..., in) by (..., out), as far as it can be tried.

    Only shapes are asked for, on the meta device.
    """
    linear = cast(nn.Linear, module)

    def holds() -> bool:
        out, width = linear.out_features, linear.in_features
        parameters = torch.empty(out, width, device="meta"), torch.empty(out, device="meta")
        trial = _bare_copy(linear, *parameters)
        for shape in ((2, 3, width), (6, width), (2, width, 5, 7)):
            try:
                y = run_with(trial, torch.empty(shape, device="meta"), {})
            except Exception:  # it may want another number of dimensions
                continue
            return not isinstance(y, Tensor) or y.shape == (*shape[:-1], out)
        return True

    return _tried(holds, otherwise=True)


def kernel_in_place(kernel: Tensor, in_channels: int) -> dict[str, Any]:
    """What a convolution's forward reads, by its name, where another kernel is in its place."""
    groups = in_channels // kernel.shape[1]
    return {"weight": kernel, "bias": None, "out_channels": len(kernel), "groups": groups}


def run_with(module: nn.Module, x: Tensor, covers: dict[str, Any]) -> Tensor:
    """Run the forward of a module's class on x with other tensors in the place of its own."""
    with covered(module, covers):
        return cast(Tensor, type(module).forward(module, x))


def is_close(found: Tensor, wanted: Tensor, close: float = _CLOSE) -> bool:
    """Tell whether two outputs are of one shape and differ by no more than rounding does."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).norm() <= close * wanted.norm())


def _bare_copy(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    """A copy in eval mode and float32, with these parameters, on their device."""
    given = {"weight": nn.Parameter(weight, False)}
    if bias is not None:
        given["bias"] = nn.Parameter(bias, False)
    known: dict[int, Any] = {}
    for name, tensor in given.items():
        if module._parameters.get(name) is not None:
            known[id(module._parameters[name])] = tensor
    adapted = isinstance(adapters := module._modules.get("adapters"), AdapterDict)
    if adapted:
        known[id(adapters)] = AdapterDict()
    trial = copy.deepcopy(module, known)
    if is_parametrized(module) and not adapted:
        # Not by remove_parametrizations, which changes the class that both have.
        trial.__class__ = type_before_parametrizations(trial)
        for name in cast(nn.ModuleDict, trial._modules.pop("parametrizations")):
            setattr(trial, name, given[name])
    return trial.eval().float().to(weight.device)


def _tried(holds: Callable[[], bool], otherwise: bool = False) -> bool:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), without_autocast(torch.empty(0)):
        try:
            return holds()
        except Exception:  # a stranger's forward: it may want other arguments, or other sizes
            return otherwise
