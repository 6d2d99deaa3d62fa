"""Try a layer with a forward of its own on random input, before its adapters are merged and after.

Where a forward makes something else of its weight W than the product with it (it scales it, rounds
it to few bits, divides by its norm), f(x; W + D) is not f(x; W) + D x. Names do not tell; numbers
do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.utilities.autocast import without_autocast

# How much of the adapters' effect may be missing, and how many units of rounding of the output.
_SHARE = 1e-4
_UNITS = 4


@dataclass(frozen=True)
class MergeCheck:
    """What a layer answered before a merge: `compare` asks again.

    Attributes:
        path, layer: The layer.
        x: A random input.
        before, base: Its output with the adapters, and without them.

    """

    path: str
    layer: AdaptedLayer
    x: Tensor
    before: Tensor
    base: Tensor

    @classmethod
    def of(cls, path: str, layer: AdaptedLayer) -> MergeCheck:
        """Run the layer on input of the kind that it takes.

        Raises:
            AdapterStateError: If it takes none of what is tried.

        """
        failure: Exception | None = None
        for x in _inputs(layer):
            try:
                before, base = _outputs(layer, x)
            except Exception as error:  # a stranger's forward: it may want other arguments
                failure = failure or error
                continue
            if isinstance(before, Tensor) and before.is_floating_point():
                return cls(path, layer, x, before, base)
        raise AdapterStateError(
            f"{path!r} ({layer.base_type.__name__}) has a forward of its own, and whether merging "
            f"keeps its output cannot be tried: {failure or 'it answers by no tensor'}. Keep the "
            "adapter unmerged, or leave this layer out with exclude_modules. "
            "(lora.exclude_modules)"
        )

    def compare(self) -> None:
        """Run the layer again.

        Raises:
            AdapterStateError: If the output is another one than before.

        """
        after, _ = _outputs(self.layer, self.x)
        unit = torch.finfo(_narrowest(self.layer, self.before)).eps
        before, base, after = (y.double() for y in (self.before, self.base, after))
        effect, error = (before - base).norm(), (after - before).norm()
        if error <= _SHARE * effect + _UNITS * unit * before.norm():
            return
        raise AdapterStateError(
            f"Merging into {self.path!r} ({self.layer.base_type.__name__}) changes its output: on "
            f"random input by {error:.3g}, where the adapters themselves change it by "
            f"{effect:.3g}. Its forward is not the plain product of input and weight; nothing was "
            "merged. Keep the adapter unmerged, or leave this layer out with exclude_modules. "
            "(lora.exclude_modules)"
        )


def checks_before_merge(
    layers: Sequence[tuple[str, AdaptedLayer]], names: Sequence[str]
) -> list[MergeCheck]:
    """Try all layers on which adapters `names` sit and of which it is not known what they do."""
    return [
        MergeCheck.of(path, layer)
        for path, layer in layers
        if not layer.is_merged_exactly() and any(_has_weights(layer, name) for name in names)
    ]


def _has_weights(layer: AdaptedLayer, name: str) -> bool:
    return name in layer.adapters and bool(layer.adapters[name].by_weight())


def _inputs(layer: AdaptedLayer) -> Iterator[Tensor]:
    weight = layer.base_weight().detach()
    generator = torch.Generator().manual_seed(0)
    if layer.kind == "embedding":
        yield torch.randint(len(weight), (2, 5), generator=generator).to(weight.device)
        return
    width = weight.shape[1]
    shapes: list[tuple[int, ...]] = [(2, 3, width), (6, width), (2, 3, 4, width), (width,)]
    if layer.kind == "conv":
        module = cast(nn.Conv2d, layer)
        sizes = [
            2 * d * (k - 1) + 5 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ]
        shapes = [(2, module.in_channels, *sizes)]
    for shape in shapes:
        yield torch.randn(shape, generator=generator).to(weight.device, layer.weight_dtype())


@torch.no_grad()
def _outputs(layer: AdaptedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer answers with its adapters, and without those that are not merged."""
    enabled = layer.adapters_enabled
    with _without_trace(layer), without_autocast(x):
        y = layer.forward(x)
        layer.adapters_enabled = False
        try:
            return y, layer.forward(x)
        finally:
            layer.adapters_enabled = enabled


@contextmanager
def _without_trace(layer: AdaptedLayer) -> Iterator[None]:
    """Inside, the layer is in eval mode; buffers and random numbers are then as before."""
    modes = [(module, module.training) for module in layer.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    devices = {t.device for t in layer.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, kept in buffers:
                buffer.copy_(kept)


def _narrowest(layer: AdaptedLayer, output: Tensor) -> torch.dtype:
    return max(layer.weight_dtype(), output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
