"""LightningModules of many kinds, after public ones; the first is what one may look like.

A new member is one entry of `ZOO`: its class, its data, and what is asked of LoraCallback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule

from lora_lightning import LoraCallback
from tests.helpers.zoo.data import Images, Points, Series, TwoViews
from tests.helpers.zoo.generative import (
    Energy,
    Gan,
    GanByRequiresGrad,
    PixelCnn,
    VqVae,
    WassersteinGan,
)
from tests.helpers.zoo.self_supervised import Byol, Dino, MemoryBank, Moco, Swav
from tests.helpers.zoo.supervised import (
    Averaged,
    Borrowed,
    Classifier,
    Distillation,
    Forecaster,
    MaxNorm,
    MeanTeacher,
    Metrics,
    SpectralNorm,
    WeightNorm,
)


@dataclass(frozen=True)
class Member:
    """A kind of module, its data, and the options of its LoraCallback.

    Attributes:
        moves: What it moves of its base by itself: parts of names.

    """

    module: Callable[[], LightningModule]
    data: Callable[[], Any] = Points
    lora: dict[str, Any] = field(default_factory=dict)
    moves: tuple[str, ...] = ()

    def callback(self) -> LoraCallback:
        return LoraCallback(**{"r": 2, "lora_dropout": 0.1, **self.lora})


# The second masked convolution has none: its weight is masked in place.
_CONV = {"target_modules": r"network\.0|head", "lora_dropout": 0.0}

ZOO = {
    "classifier": Member(Classifier),
    "distillation": Member(Distillation),
    "mean teacher": Member(MeanTeacher, moves=("teacher.",)),
    "averaged model": Member(Averaged, moves=("average.",)),
    "forecaster, LSTM": Member(Forecaster, Series),
    "spectral norm": Member(SpectralNorm, moves=("._u", "._v")),
    "weight norm": Member(WeightNorm),
    "max norm": Member(MaxNorm, moves=("network.0.weight",)),
    "metric states": Member(Metrics),
    "partial state dict": Member(Borrowed),
    "BYOL": Member(Byol, TwoViews, moves=("target.",)),
    "MoCo": Member(Moco, TwoViews, moves=("keys.", "queue", "position")),
    "DINO": Member(Dino, TwoViews, moves=("center",)),
    "SwAV": Member(Swav, TwoViews, {"modules_to_save": ["prototypes"]}),
    "memory bank": Member(MemoryBank, TwoViews, moves=("bank", "labels")),
    "GAN": Member(Gan),
    "GAN by requires_grad": Member(GanByRequiresGrad),
    "Wasserstein GAN": Member(WassersteinGan, moves=("critic.",)),
    "energy model": Member(Energy, moves=("replay",)),
    "PixelCNN": Member(PixelCnn, Images, _CONV, moves=("network.2.weight",)),
    "VQ-VAE": Member(VqVae, moves=("codebook.", "commitment")),
}
