"""AdaLoRA as peft makes it, and the names of its tensors here."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
from torch import nn

from lora_lightning import (
    inject_adapter,
    load_adapter_state_dict,
)
from lora_lightning.adapters.adalora import AdaLoraConfig
from tests.helpers.tensors import randomize, trainable


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


def adalora_pair(base: nn.Module, **options: Any) -> tuple[peft.PeftModel, nn.Module]:
    """The same net adapted by peft and by us, with the same random adapter values."""
    options = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "target_modules": ["proj"], **options}
    theirs = adalora_of_peft(copy.deepcopy(base), **options)
    ours = copy.deepcopy(base)
    inject_adapter(ours, AdaLoraConfig(**options))
    randomize(trainable(theirs).values())
    state = peft.get_peft_model_state_dict(theirs)
    load_adapter_state_dict(ours, {short_name(key): value for key, value in state.items()})
    return theirs, ours
