"""The page for those who come from elsewhere: its right-hand columns, run as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.command import run_command
from tests.helpers.markdown import PAGES
from tests.helpers.paths import ROOT
from tests.helpers.tiny_lm import tiny_llama

PAGE = PAGES["configs/coming_from/README.md"]
SECTIONS = {
    section.partition("\n")[0]: section
    for section in PAGE.split("\n## ")[1:]
    if "| there" in section
}
# Of which another test runs a fit (test_options.py, test_network.py).
NOT_RUN = {"--model.compile", "--model.quantize"}


def cells(title: str) -> list[str]:
    """The right-hand column of a section's table."""
    lines = re.findall(r"^\| (.*) \| (.*) \|$", SECTIONS[title], re.MULTILINE)
    return [right for _, right in lines[1:]]


def options(title: str) -> list[str]:
    """All options of a column; of alternatives, the first."""
    found: list[str] = []
    for cell in cells(title):
        first = re.match(r"`(--[^`]*)`", cell)
        words = shlex.split(first[1]) if first else []
        if words and words[0] not in NOT_RUN:
            found += words
    return found


def verbs(title: str) -> list[list[str]]:
    """The commands of a column that take its run."""
    found = re.findall(r"`lora-lightning ([^`]*)`", "\n".join(cells(title)))
    calls = [shlex.split(call) for call in found]
    return [call for call in calls if len(call) > 1 and call[1].startswith("runs/")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(
        tmp_path / "NAME",
        "chatml",
        hidden_size=64,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    rows = [
        {"prompt": f"{i} plus {i} is", "completion": f" {2 * i}, and so on" * 20}
        for i in range(480)
    ]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def test_five_projects_are_there() -> None:
    assert len(SECTIONS) == 5
    for title in SECTIONS:
        assert len(options(title)) >= 24, title
        assert {"fit", "merge"} <= {call[0] for call in [*verbs(title), ["fit"]]}, title


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = key in ("init_args", "config") or not isinstance(value, dict)
        name = prefix if key == "init_args" else f"{prefix}{key}."
        found |= (
            flat(value, name) if isinstance(value, dict) else {name[:-1]: value} if inner else {}
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_the_right_hand_side_runs(
    title: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = options(title)
    base = ["--config", "configs/sft.yaml", "--model.model", "NAME", "--data.train", "my.jsonl"]
    quick = ["--trainer.accelerator=cpu", "--model.max_new_tokens=4"]
    run_command(folder, monkeypatch, capfd, "fit", *base, *given, *quick)
    run = Path(given[given.index("--trainer.default_root_dir") + 1])
    stored = flat(yaml.safe_load((folder / run / "config.yaml").read_text()))
    for option, value in zip(given[::2], given[1::2], strict=True):
        found = stored[option.removeprefix("--")]
        # YAML takes 2e-4 for a text; the command does not.
        assert found == (float(value) if isinstance(found, float) else yaml.safe_load(value)), (
            option
        )
    for call in verbs(title):
        if call[0] == "fit":
            call = [*call, "--trainer.max_epochs", "4"]
        if call[0] == "generate":
            call = [*call, "--prompt", "1 plus 1 is"]
        run_command(folder, monkeypatch, capfd, *call)
    assert (folder / "merged/config.json").is_file()
