"""Trained runs, made once a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.trained_runs import language_model_run, own_module_run


@pytest.fixture(scope="session")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_module_run(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def lm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model_run(tmp_path_factory.mktemp("lm"))
