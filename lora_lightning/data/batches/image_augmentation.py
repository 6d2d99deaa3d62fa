"""Random changes to images that leave their class what it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_lightning.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Augmentation:
    """Crops and flips a PIL image at random.

    Random numbers are torch's global ones: of the process, or of a data loader's worker, which
    torch seeds from them. So `seed_everything` and a restored checkpoint govern them.

    Attributes:
        random_horizontal_flip: Probability that left and right are exchanged.
        random_crop: The least share of the image's area that a crop keeps, above 0; 1 crops
            nothing. The share is drawn uniformly up to 1, the ratio of its sides from 3/4 to 4/3 of
            the image's own (uniformly in its logarithm), its place uniformly: the crop of
            Inception (Szegedy et al. 2014) but for the image's own ratio.
    """

    random_horizontal_flip: float = 0.0
    random_crop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.random_horizontal_flip <= 1:
            raise ConfigError(
                "random_horizontal_flip is a probability, from 0 to 1; found "
                f"{self.random_horizontal_flip}. (data.random_horizontal_flip)"
            )
        if not 0 < self.random_crop <= 1:
            raise ConfigError(
                "random_crop is the least share of the image that is kept, above 0 and at most 1; "
                f"found {self.random_crop}. (data.random_crop)"
            )

    def __call__(self, image: Image) -> Image:
        """Another image."""
        from PIL.Image import Transpose

        if self.random_crop < 1:
            image = image.crop(self.box(*image.size))
        if self.random_horizontal_flip and torch.rand(()) < self.random_horizontal_flip:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        return image

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge of a crop."""
        share, tilt, left, upper = torch.rand(4, dtype=torch.float64).tolist()
        share = self.random_crop + share * (1 - self.random_crop)
        # A side cannot exceed the image's, so the ratio is held to what the share allows.
        most = min(math.log(4 / 3), -math.log(share))
        ratio = math.exp((2 * tilt - 1) * most)
        wide = max(1, round(width * math.sqrt(share * ratio)))
        high = max(1, round(height * math.sqrt(share / ratio)))
        x, y = round(left * (width - wide)), round(upper * (height - high))
        return x, y, x + wide, y + high
