"""F1 of entities, which tags of their words mark (IOB, IOBES, BILOU)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lora_lightning.utilities.constants import IGNORE_INDEX

Entity = tuple[int, int, str]

# B(egin), I(nside), E(nd) or L(ast), S(ingle) or U(nit): IOB1, IOB2, IOBES and BILOU.
_TAG = re.compile(r"([BIELSU])-(.+)")


def writes_entities(names: Sequence[str]) -> bool:
    """True if the names of classes are the tags of a scheme for entities: `O`, `B-PER`, `I-PER`."""
    return any(name != "O" for name in names) and all(
        name == "O" or _TAG.fullmatch(name) for name in names
    )


def entities(tags: Sequence[str]) -> set[Entity]:
    """First word, word after the last, and type of each entity, as CoNLL's `conlleval` reads tags.

    An entity begins where a tag says so, and also where one goes on that has not begun (I-PER after
    O or after B-LOC).
    """
    found = set()
    start, kind = 0, ""  # of the entity that is open; no type: none is
    for place, tag in enumerate([*tags, "O"]):
        match = _TAG.fullmatch(tag)
        position, type_ = match.groups() if match else ("", "")
        goes_on = position in ("I", "E", "L") and type_ == kind
        if kind and not goes_on:
            found.add((start, place, kind))
        if not goes_on:
            start, kind = place, type_
        if position in ("E", "L", "S", "U"):
            found.add((start, place + 1, kind))
            kind = ""
    return found


class EntityF1(Metric):
    """F1 of entities, of all types together: 2 R / (S + T).

    R: entities that are found with the right words and type; S: entities that the model says;
    T: entities that there are (Tjong Kim Sang and De Meulder 2003).

    Args:
        names: The classes in order, which are tags of entities.
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    said: Tensor
    true: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        for state in ("right", "said", "true"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            predicted: Class ids (sentences, tokens).
            labels: Those of first sub-tokens, else `IGNORE_INDEX`.
        """
        kept = labels != IGNORE_INDEX
        for classes, truth, words in zip(predicted.cpu(), labels.cpu(), kept.cpu(), strict=True):
            said, true = (
                entities([self.names[number] for number in row[words].tolist()])
                for row in (classes, truth)
            )
            self.right += len(said & true)
            self.said += len(said)
            self.true += len(true)

    def compute(self) -> Tensor:
        """F1; 0 where there are no entities and none are said."""
        return 2 * self.right / (self.said + self.true).clamp(min=1)
