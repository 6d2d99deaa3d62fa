"""AdaLoRA as peft makes it, and the names of its tensors here."""

from __future__ import annotations

import warnings
from typing import Any

import peft
from torch import nn


def adalora_of_peft(base: nn.Module, **options: Any) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out for every Conv1D
        model = peft.get_peft_model(base, peft.AdaLoraConfig(**{"total_step": 15, **options}))
    for name, parameter in model.named_parameters():
        if "ranknum" in name:  # on any base but fp32, peft would train it, and not save it
            parameter.requires_grad_(False)
    return model


def short_name(key: str) -> str:
    key = key.removeprefix("base_model.model.").replace(".base_layer", "")
    return key.replace(".adapters.default", "").removesuffix(".default")
