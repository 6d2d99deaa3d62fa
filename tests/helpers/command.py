"""The command `lora-lightning` in this process: importing torch in another takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import lora_lightning.cli.main


def run_command(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *arguments: str,
    fails: int = 0,
) -> str:
    """What `lora-lightning *arguments` prints in `folder`; its exit code must be `fails`."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["lora-lightning", *arguments])
    code = 0
    try:
        lora_lightning.cli.main.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capfd.readouterr()
    output = captured.out + captured.err
    assert code == fails, output
    return output
