"""Class names in order, which model, data, trained head and options must agree on."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lora_lightning.errors import ConfigError, first_few, nearest_hint
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.utilities.hub import load_pretrained


def agreed_label_names(ours: list[str] | None, trainer: Trainer | None) -> list[str]:
    """The names of a task and those of its Trainer's data module, which are to be the same.

    Raises:
        ConfigError: If they are not, or are not known, or are no classes.
    """
    data = getattr(trainer, "datamodule", None)
    try:
        theirs: list[str] | None = getattr(data, "label_names", None)
    except ConfigError:  # data without labels, to be predicted
        if not ours:
            raise
        theirs = None
    if ours and theirs and ours != theirs:
        raise ConfigError(
            f"the model's classes are not the data's: {difference(ours, theirs)} "
            "(model.label_names, data.label_names)"
        )
    names = ours or theirs
    if not names:
        raise ConfigError(
            "the classes are not known: the Trainer has no data module with `label_names`, "
            "so name them in order. (model.label_names)"
        )
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(
            f"label_names must be at least 2 different names, found {names}. (model.label_names)"
        )
    return list(names)


def check_trained_head(model: str, hub_options: dict[str, Any], names: list[str]) -> None:
    """A head that came with a model has rows for the model's own classes, in their order.

    Raises:
        ConfigError: If these are our classes in another order. Where they are other classes, a
            warning says what each row starts out as.
    """
    config = load_pretrained("AutoConfig", model, **hub_options)
    theirs = [str(config.id2label.get(number)) for number in range(config.num_labels)]
    if theirs == names or all(name.startswith("LABEL_") for name in theirs):
        return  # transformers' own names say nothing
    if sorted(theirs) == sorted(names):
        raise ConfigError(
            f"the head of {model!r} was trained for these classes in another order, {theirs}; "
            f"found {names}. Name them in the head's order. (data.label_names)"
        )
    rank_zero_warn(
        f"The head of {model!r} was trained for other classes, {first_few(theirs, 20)}: each of "
        f"its rows starts out as that of the class in the same place of {first_few(names, 20)}. "
        "Another order can be named. (data.label_names)"
    )


def weights_of_classes(weights: dict[str, float], names: list[str]) -> Tensor:
    """The weight of each class, in order; 1 where none is given.

    Raises:
        ConfigError: If there is no such class, or a weight that is none.
    """
    for name, weight in weights.items():
        if name not in names:
            raise ConfigError(
                f"class_weights: there is no class {name!r}. The classes are "
                f"{first_few(names, 20)}.{nearest_hint(name, names)} (model.class_weights)"
            )
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"class_weights: the weight of {name!r} must be positive and finite, found "
                f"{weight}. (model.class_weights)"
            )
    return torch.tensor([float(weights.get(name, 1)) for name in names], dtype=torch.float32)


def difference(first: list[str], second: list[str]) -> str:
    """Describe how two lists of names differ."""
    if set(first) == set(second):
        return f"the same names in another order, {first} and {second}."
    only_first = first_few([name for name in first if name not in second]) or "nothing"
    only_second = first_few([name for name in second if name not in first]) or "nothing"
    return (
        f"{len(first)} and {len(second)} names; only in the first: {only_first}; "
        f"only in the second: {only_second}."
    )
