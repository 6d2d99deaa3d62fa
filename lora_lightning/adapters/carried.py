"""Marks on adapters that a teacher carries to follow its student (`engine/followers.py`).

Such an adapter never trains, and belongs to the teacher rather than to the adapter of its name. The
marks stand in the adapter's own dictionary, where `deepcopy` and `pickle` take them along.
"""

from __future__ import annotations

from torch import nn

_CARRIED = "_carried"
_ALIKE = "_starts_alike"


def mark_carried(adapter: nn.Module) -> None:
    """Note that a teacher carries this adapter."""
    adapter.__dict__[_CARRIED] = True


def is_carried(adapter: nn.Module) -> bool:
    """True for an adapter that a teacher carries."""
    return _CARRIED in adapter.__dict__


def mark_alike(adapter: nn.Module) -> None:
    """Note that a carried adapter has the same start values in every process."""
    adapter.__dict__[_ALIKE] = True


def starts_alike(adapter: nn.Module) -> bool:
    """True for a carried adapter that has the same start values in every process."""
    return _ALIKE in adapter.__dict__
