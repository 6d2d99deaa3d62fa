"""(IA)^3: one learned factor for each output, or for each input, of a frozen map.

    y' = l * f(x),    or, on a feedforward module,    y' = f(l * x),

f being the map below the adapter, bias included.

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning" (arXiv:2205.05638), section 3.3. Names, shapes and start are PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter, AdapterSpec, BaseWeight, Convolution
from lora_lightning.adapters.config import AdapterConfig, check_expression
from lora_lightning.adapters.initialization import constant_, normal_
from lora_lightning.errors import TargetError, did_you_mean, first_few


@dataclass(frozen=True, kw_only=True)
class Ia3Config(AdapterConfig):
    """Options of an (IA)^3 adapter; names and defaults are those of PEFT.

    Args:
        feedforward_modules: Which of the targets get a factor for each input instead of one for
            each output (in the paper: what leads out of the feedforward block): a list of names
            (whole path or its last part), or one regular expression over whole paths.
        init_ia3_weights: true: all factors are 1 (the adapter starts as a no-op); false: random
            ones, for tests.

    Raises:
        TargetError: At injection, if feedforward_modules fits no adapted module.

    """

    peft_type = "IA3"
    free_to_change = AdapterConfig.free_to_change | {"init_ia3_weights"}

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.feedforward_modules, str):
            check_expression("feedforward_modules", self.feedforward_modules)
        super().__post_init__()

    def prepare(
        self, shapes: Mapping[str, Sequence[tuple[int, ...]]], known: Mapping[str, Any]
    ) -> None:
        """Check that all of `feedforward_modules` is adapted."""
        paths = [*shapes, *known]
        for name, expression in self._feedforward().items():
            if any(re.fullmatch(expression, path) for path in paths):
                continue
            near = did_you_mean(name, [*paths, *(path.rpartition(".")[2] for path in paths)])
            raise TargetError(
                f"feedforward_modules {name!r} fits none of the {len(paths)} adapted modules "
                f"({first_few(paths, 3)}). {f'Did you mean {near!r}? ' if near else ''}Its modules "
                "must be among target_modules. (lora.feedforward_modules)"
            )

    def is_feedforward(self, path: str) -> bool:
        """Tell whether the inputs of the module at `path` are scaled, not its outputs."""
        return any(re.fullmatch(e, path) for e in self._feedforward().values())

    def _feedforward(self) -> dict[str, str]:
        names = self.feedforward_modules
        if isinstance(names, str):
            return {names: names}
        return {name: rf"(.*\.)?{re.escape(name)}" for name in names or ()}

    def file_options(self) -> dict[str, Any]:
        """Return the options of adapter_config.json; names as the expression that means just them.

        PEFT takes a name for the end of a path, within a word too, and needs some value.
        """
        expression = "|".join(self._feedforward().values())
        return {**super().file_options(), "feedforward_modules": expression or []}


IA3Config = Ia3Config  # PEFT's spelling


class Ia3Adapter(Adapter):
    """(IA)^3 on a linear map.

    A factor is near 1, where numbers of 16 bits lie far apart: there, l * y is y + (l - 1) y.

    Shapes:
        x (..., in), y (..., out); ia3_l (out, 1), on a feedforward module (1, in).

    """

    config: Ia3Config

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__(spec)
        self.is_feedforward = spec.config.is_feedforward(spec.path)
        self.along_activation = (-1, *(1 for _ in spec.shape[2:]))  # the shape of ia3_l there
        self.ia3_l = spec.parameter(*self.factor_shape())
        self.reset_parameters()

    def factor_shape(self) -> tuple[int, ...]:
        """The shape of ia3_l."""
        out_features, in_features = self.spec.shape
        return (1, in_features) if self.is_feedforward else (out_features, 1)

    def reset_parameters(self) -> None:
        """All factors 1, or random with `init_ia3_weights: false`."""
        super().reset_parameters()
        if self.config.init_ia3_weights:
            constant_(self.ia3_l, 1)
        else:
            normal_(self.ia3_l, 1, self.spec.generator("ia3_l"))

    def _scale(self, activation: Tensor) -> Tensor:
        factors = self.ia3_l.reshape(self.along_activation)
        if activation.dtype.itemsize >= 4:
            return activation * factors.to(activation.dtype)
        return torch.addcmul(activation, activation, (factors - 1).to(activation.dtype))

    def transform_input(self, x: Tensor, base: BaseWeight) -> Tensor:
        """l * x on a feedforward module."""
        return self._scale(x) if self.is_feedforward else x

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """l * y, unless x was scaled."""
        return y if self.is_feedforward else self._scale(y)

    def transform_weight(self, weight: Tensor, base: BaseWeight) -> Tensor:
        """Rows scaled by l; columns on a feedforward module."""
        factors, groups = self.ia3_l.to(weight), self.spec.groups
        if not self.is_feedforward:
            factors = factors.view(-1, *(1 for _ in weight.shape[1:]))
        elif groups > 1:
            by_group = factors.view(groups, 1, -1, *factors.shape[2:])
            return torch.mul(weight.unflatten(0, (groups, -1)), by_group).flatten(0, 1)
        return weight * factors

    def transform_bias(self, bias: Tensor, base: BaseWeight) -> Tensor:
        """l * bias, unless the inputs are scaled."""
        return bias if self.is_feedforward else bias * self.ia3_l.flatten().to(bias)


class Ia3ConvAdapter(Ia3Adapter):
    """(IA)^3 on a convolution: a factor for each channel.

    Shapes:
        x (batch, in, *size), y (batch, out, *size'); ia3_l (1, out or in, 1, ...).

    """

    def peft_supports(self, conv: Convolution, kernel: tuple[int, ...]) -> bool:
        """In 2 and 3 dimensions: only the output or the input is scaled, whatever the padding."""
        return conv.dims > 1

    def factor_shape(self) -> tuple[int, ...]:
        """The shape of ia3_l."""
        out_channels, in_channels, *kernel = self.spec.shape
        channels = in_channels * self.spec.groups if self.is_feedforward else out_channels
        return (1, channels, *(1 for _ in kernel))
