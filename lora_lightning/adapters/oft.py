"""OFT: rotate what a frozen weight reads, block by block.

    f'(x) = f(x R),    W' = W R^T,    R = diag(R_1, ..., R_n) orthogonal,

each R_i (b, b) made from a skew-symmetric Q_i of b (b - 1) / 2 free numbers by Cayley's map, exact
(I - Q)(I + Q)^-1, or as the first terms of a Neumann series, I + 2 Q + 2 Q^2 + ... + Q^k, which
is (I + Q)(I - Q)^-1 (other sign of Q, as in PEFT's files). Constrained OFT keeps |Q_i| <= eps /
sqrt(n).

Source: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning"
(arXiv:2306.07280), sections 3 and 4, appendix for convolutions; rotation of the input and Neumann
series: Qiu et al. 2025, "Orthogonal Finetuning Made Scalable" (arXiv:2506.19847). Names, shapes
and start values are those of PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter, AdapterSpec, BaseWeight, Convolution
from lora_lightning.adapters.config import AdapterConfig, Positive, Probability
from lora_lightning.adapters.initialization import constant_, normal_
from lora_lightning.errors import ConfigError, RankError, warn
from lora_lightning.utilities.autocast import is_autocast, without_autocast


@dataclass(frozen=True, kw_only=True)
class OftConfig(AdapterConfig):
    """Options of an OFT adapter; names and defaults are those of PEFT.

    Args:
        r: Number of blocks in each layer; 0: as oft_block_size says. Exactly one of the two is
            above 0.
        oft_block_size: Size b of the blocks; 0: as r says. Where it (or r) does not divide a
            layer's width, the nearest number that does is taken, with a warning.
        module_dropout: Probability in [0, 1) that a block does not rotate in a training step.
        coft: Keep every Q_i within eps / sqrt(number of blocks) of zero.
        eps: Bound of coft.
        block_share: One R_i for all blocks of a layer.
        use_cayley_neumann: Neumann series instead of the exact map: faster, orthogonal only as
            long as Q is small.
        num_cayley_neumann_terms: Number of its terms.
        init_weights: true: Q = 0 (the adapter starts as a no-op); false: random, for tests.

    """

    peft_type = "OFT"
    free_to_change = AdapterConfig.free_to_change | {"module_dropout", "init_weights"}
    file_bias = "oft_only"

    r: int = 0
    oft_block_size: int = 32
    module_dropout: Probability = 0.0
    coft: bool = False
    eps: Positive = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    init_weights: bool = True

    def __post_init__(self) -> None:
        sizes = (self.r, self.oft_block_size)
        if not all(type(size) is int and size >= 0 for size in sizes) or sizes.count(0) != 1:
            raise ConfigError(
                f"r={self.r!r} and oft_block_size={self.oft_block_size!r}: their product is the "
                "width of a layer, so exactly one of them is given and the other is 0. "
                "(lora.oft_block_size)"
            )
        terms = self.num_cayley_neumann_terms
        if not isinstance(terms, int) or terms < 2:
            raise ConfigError(
                f"num_cayley_neumann_terms is {terms!r}; it is an integer of at least 2: the first "
                "term alone, I, rotates nothing. (lora.num_cayley_neumann_terms)"
            )
        super().__post_init__()

    def blocks(self, width: int) -> tuple[int, int]:
        """Number and size of the blocks of a layer that reads `width` values."""
        key = "r" if self.r else "oft_block_size"
        asked = self.r or self.oft_block_size
        found = asked
        if width % asked:
            divisors = (n for n in range(1, width + 1) if width % n == 0)
            found = min(divisors, key=lambda n: (abs(n - asked), n))  # PEFT's choice
            warn(
                f"{key}={asked} does not divide {width}, the width of an adapted layer: {found} is "
                f"used there. (lora.{key})",
                stacklevel=2,
            )
        return (found, width // found) if self.r else (width // found, found)

    def file_options(self) -> dict[str, Any]:
        """The options as PEFT's adapter_config.json has them, and since when it means this."""
        return {**super().file_options(), "peft_version": "0.18.0"}


OFTConfig = OftConfig  # PEFT's spelling


class OftAdapter(Adapter):
    """OFT on a linear map: what lies below reads x R.

    x R is computed as x + x (R - I): exact where nothing is rotated, and what is rounded to the
    activation's dtype is small.

    Shapes:
        x (..., in); oft_R (in / b, b (b - 1) / 2), the upper triangles of Q_1, Q_2, ... row by
        row; (1, b (b - 1) / 2) with `block_share`.

    """

    config: OftConfig

    file_names: ClassVar[dict[str, str]] = {"oft_R": "oft_R.weight"}

    def __init__(self, spec: AdapterSpec) -> None:
        config: OftConfig = spec.config
        super().__init__(spec)
        width = math.prod(spec.shape[1:]) * spec.groups  # of what is rotated
        self.blocks, self.size = config.blocks(width)
        if self.size == 1:
            raise RankError(
                f"{spec.path!r} (weight {tuple(spec.shape)}) reads {width} values; blocks of 1, "
                "to which r and oft_block_size lead there, rotate nothing. Choose others, or leave "
                "it out with exclude_modules. (lora.oft_block_size)"
            )
        stored = 1 if config.block_share else self.blocks
        root = torch.tensor(stored, device="cpu").sqrt()  # in fp32, as in PEFT
        self.limit = (config.eps / root).item()
        self.oft_R = spec.parameter(stored, self.size * (self.size - 1) // 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set no rotation, or a random one with `init_weights: false`."""
        super().reset_parameters()
        if self.config.init_weights:
            constant_(self.oft_R, 0)
        else:
            normal_(self.oft_R, 0.1, self.spec.generator("oft_R"))

    def turn(self) -> Tensor:
        """R - I by blocks, (in / b, b, b); (1, b, b) where they all rotate alike."""
        config = self.config
        with without_autocast(self.oft_R):
            q = self._skew(self._constrained() if config.coft else self.oft_R)
            if config.use_cayley_neumann:
                return _neumann_turn(q, config.num_cayley_neumann_terms)
            one = torch.eye(self.size, dtype=q.dtype, device=q.device)
            turn: Tensor = torch.linalg.solve(one + q, -2 * q, left=False)
        return turn

    def forward_turn(self) -> Tensor:
        """R - I as it acts in forward: in training, `module_dropout` leaves out some blocks."""
        turn, dropout = self.turn(), self.config.module_dropout
        if self.training and dropout:
            turn = turn * (torch.rand(self.blocks, 1, 1, device=turn.device) >= dropout)
        return turn

    def _constrained(self) -> Tensor:
        # A projected gradient step: training goes on from the projected values, not through them.
        trains = self.training and self.oft_R.requires_grad and torch.is_grad_enabled()
        with torch.no_grad():
            # Of the matrix Q.
            norm = math.sqrt(2) * torch.linalg.vector_norm(self.oft_R, dim=1, keepdim=True)
            projected: Tensor = self.oft_R * (self.limit / norm).clamp(max=1)
            if not trains:
                return projected
            self.oft_R.copy_(projected)
        return self.oft_R

    def _skew(self, triangles: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=triangles.device)
        upper = triangles.new_zeros(len(triangles), self.size, self.size)
        upper[:, rows, columns] = triangles
        return upper - upper.mT

    def transform_input(self, x: Tensor, base: BaseWeight) -> Tensor:
        """The product x R."""
        return x + blockwise(x, self.forward_turn())

    def transform_weight(self, weight: Tensor, base: BaseWeight) -> Tensor:
        """The product W R^T."""
        return weight + blockwise(weight, self.turn().mT)

    def extra_repr(self) -> str:
        """Number and size of the blocks, as they appear in `print(model)`."""
        return f"r={self.blocks}, oft_block_size={self.size}"


class OftEmbeddingAdapter(OftAdapter):
    """OFT on an embedding table: its rows are rotated, y R and W R; x (...) are ids."""

    file_names: ClassVar[dict[str, str]] = {"oft_R": "oft_embedding_R.weight"}

    def transform_input(self, x: Tensor, base: BaseWeight) -> Tensor:
        """The ids themselves."""
        return x

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """The product y R."""
        return y + blockwise(y, self.forward_turn())

    def transform_weight(self, weight: Tensor, base: BaseWeight) -> Tensor:
        """The product W R."""
        return weight + blockwise(weight, self.turn())


class OftConvAdapter(OftAdapter):
    """OFT on a convolution: what each position reads, its patch of in * kernel values, is rotated.

    Where the kernel is a single point, that is a rotation of the channels. Otherwise patches
    overlap, and the kernel is rotated instead: y' = y + x * W (R^T - I), W being the kernel below.
    (PEFT writes rotated patches back into one image and adds them up where they overlap, which
    changes the output even where R = I; its merged kernel is W R^T, like this one.)

    With groups, every group rotates its own channels.

    Shapes:
        x (batch, in, *size); oft_R (in * prod(kernel) / b, b (b - 1) / 2).

    """

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__(spec)
        self._is_pointwise = math.prod(spec.shape[2:]) == 1
        each = math.prod(spec.shape[1:])
        if each % self.size:
            raise RankError(
                f"{spec.path!r} has {spec.groups} groups that read {each} values each, which "
                f"blocks of {self.size} do not divide. Choose a divisor of it as oft_block_size, "
                "or leave this layer out with exclude_modules. (lora.oft_block_size)"
            )

    def peft_supports(self, conv: Convolution, kernel: tuple[int, ...]) -> bool:
        """Only in 2 dimensions and for 1x1 kernels: others PEFT turns otherwise than it merges."""
        return conv.dims == 2 and set(kernel) == {1} and super().peft_supports(conv, kernel)

    def transform_input(self, x: Tensor, base: BaseWeight) -> Tensor:
        """x with its channels rotated, where the kernel is a single point."""
        if not self._is_pointwise:
            return x
        channel = -1 - cast(Convolution, self.spec.conv).dims
        turned = blockwise(x.movedim(channel, -1), self.forward_turn())
        return x + turned.movedim(-1, channel)

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + x * W (R^T - I), unless x was rotated."""
        if self._is_pointwise:
            return y
        change = self._turned(base.weight_below(self), self.forward_turn())
        return y + base.apply_weight(x, change).to(y.dtype)

    def transform_weight(self, weight: Tensor, base: BaseWeight) -> Tensor:
        """The product W R^T, group by group."""
        return weight + self._turned(weight, self.turn())

    def _turned(self, weight: Tensor, turn: Tensor) -> Tensor:
        # (out, in / groups, *kernel) as rows that hold a patch: one of each group side by side.
        by_group = weight.unflatten(0, (self.spec.groups, -1)).flatten(2).transpose(0, 1)
        turned = blockwise(by_group.flatten(1), turn.mT).view(by_group.shape)
        return turned.transpose(0, 1).reshape(weight.shape)


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """The product x diag(B_1, ...); x (..., n b), blocks (n, b, b), or (1, b, b) for equal ones."""
    if not is_autocast(x):
        blocks = blocks.to(x.dtype)
    parts: Tensor = x.unflatten(-1, (-1, blocks.shape[-1]))
    if len(blocks) == 1:
        return (parts @ blocks[0]).flatten(-2)
    return torch.einsum("...nb,nbc->...nc", parts, blocks).flatten(-2)


def _neumann_turn(q: Tensor, terms: int) -> Tensor:
    """2 Q + 2 Q^2 + ... + Q^k; as in PEFT, k = terms - 1, but at least 3, and just 2 Q for two."""
    turn, power = 2 * q, q
    highest = 1 if terms == 2 else max(terms - 1, 3)
    for exponent in range(2, highest + 1):
        power = power @ q
        turn = turn + (power if exponent == highest else 2 * power)
    return turn
