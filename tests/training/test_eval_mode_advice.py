"""Lightning's advice on modules in eval mode: not of norm layers that are held so on purpose."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from lora_lightning import LoraCallback
from lora_lightning.training.frozen_base import EvalModeAdvice
from tests.helpers.lightning_modules import OPTIONS, Data, Net, make_trainer


class Forgotten(Net):
    """A part of it was left in eval mode, as by from_pretrained."""

    def __init__(self) -> None:
        super().__init__()
        self.body.eval()


def advice(folder: Path, module: Net, *callbacks: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = [*warnings.filters]
        make_trainer(folder, *callbacks).fit(module, Data())
        assert [*warnings.filters] == before
    return [str(w.message)[:20] for w in caught if "in eval mode" in str(w.message)]


def test_what_is_held_on_purpose_is_no_mistake(tmp_path: Path) -> None:
    assert advice(tmp_path, Net(), LoraCallback(**OPTIONS)) == []


def test_what_was_forgotten_is_told(tmp_path: Path) -> None:
    assert advice(tmp_path, Forgotten(), LoraCallback(**OPTIONS)) != []
    assert advice(tmp_path, Forgotten(), LoraCallback(enabled=False)) == ["Found 5 module(s) in"]


def test_without_the_filter_it_would_be_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(EvalModeAdvice, "leave_out", lambda *_: None)
    assert advice(tmp_path, Net(), LoraCallback(**OPTIONS)) == ["Found 1 module(s) in"]


def test_an_end_before_training_leaves_no_filter(tmp_path: Path) -> None:
    class Broken(Net):
        def validation_step(self, *_: Any) -> None:
            raise RuntimeError("in the sanity check")

    with warnings.catch_warnings():
        before = [*warnings.filters]
        with pytest.raises(RuntimeError, match="sanity"):
            make_trainer(tmp_path, LoraCallback(**OPTIONS)).fit(Broken(), Data())
        assert [*warnings.filters] == before
