"""Modules of many kinds, each put through one and the same examination (`lora_lightning.examine`)."""

from __future__ import annotations

import pytest

from lora_lightning import examine
from tests.helpers.zoo import ZOO

ALWAYS = ("GAN", "BYOL")  # the others take a while
KINDS = [kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.slow) for kind in ZOO]


@pytest.mark.parametrize("kind", KINDS)
def test_every_promise_holds(kind: str) -> None:
    member = ZOO[kind]
    found = examine(
        member.module,
        member.data,
        member.callback(),
        trainer_options={"accelerator": "cpu"},
        show=False,
    )
    assert {row.name: row.reason for row in found.rows if row.holds is not True} == {}
    moved = found["base untouched"].reason
    assert ("the module itself moves" in moved) == bool(member.moves)
    for part in member.moves[:1]:
        assert part in moved


def test_there_are_enough_kinds() -> None:
    assert len(ZOO) >= 12
    assert len({member.module for member in ZOO.values()}) == len(ZOO)
