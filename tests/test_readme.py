"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import yaml
from modules import Data, Net

from lora_lightning import (
    LoraCallback,
    LoraConfig,
    active_adapters,
    adapter_names,
    inject_adapter,
    save_adapter,
)

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    own_code, engine, many = (block for block in blocks("python") if "import" in block)
    names: dict[str, Any] = {}
    exec(own_code, names)
    assert len(names["predictions"]) == 8
    assert Path(names["best"]).is_file()
    assert names["longer"].current_epoch == 5
    names = {}
    exec(engine, names)
    assert type(names["model"][0]).__name__ == "Linear"
    names = {}
    exec(many, names)
    assert adapter_names(names["fresh"]) == ["style"]
    assert sorted(p.name for p in Path("adapters/all").iterdir() if p.is_dir()) == [
        "style",
        "topic",
        "turn",
    ]


def test_two_callbacks_of_the_text(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    base = Net()
    inject_adapter(base, LoraConfig(r=2), "style")
    save_adapter(base, "adapters/style", "style")
    (code,) = (block for block in blocks("python") if "init_from" in block)
    options = "enable_checkpointing=False, logger=False, max_epochs=1, accelerator='cpu', "
    code = "trainer = " + code.replace("L.Trainer(", f"L.Trainer({options}").replace("r=8", "r=2")
    names = {"L": lightning, "LoraCallback": LoraCallback}
    exec(code, names)
    names["trainer"].fit(module := Net(), Data())
    assert active_adapters(module) == ["style", "topic"]


def test_commands_parse() -> None:
    """Every `lora-lightning` call in the README is one that the parser takes."""
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    calls = [shlex.split(c)[1:] for c in commands if c.startswith("lora-lightning")]
    assert len(calls) == 6
    assert {call[0] for call in calls} <= {"fit", "validate", "test", "predict"}


@pytest.mark.parametrize("config", blocks("yaml"))
def test_yaml_is_accepted(config: str, tmp_path: Path, monkeypatch: Any) -> None:
    from lora_lightning.cli import LoraCLI

    content = yaml.safe_load(config)
    for section in ("model", "data"):  # the user's own classes
        if "my_module" in content.get(section, {"class_path": "my_module"})["class_path"]:
            content[section] = {
                "class_path": {"model": "modules.Net", "data": "modules.Data"}[section]
            }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora-lightning", "fit", "--config", "c.yaml"])

    class ParseOnly(LoraCLI):
        def instantiate_classes(self) -> None:
            self.parser.instantiate_classes(self.config)

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    ParseOnly()


def test_setup_commands_are_one_line_each() -> None:
    setup = [block.strip() for block in blocks("bash") if "venv" in block]
    assert len(setup) == 2
    assert all("\n" not in command for command in setup)
    assert setup[0].endswith("lora-lightning fit --config configs/quickstart.yaml")
    assert setup[1].endswith("pytest -n 2")


def test_figures_and_names_are_current() -> None:
    import lora_lightning

    for name in re.findall(r"from lora_lightning import (\w+)", README):
        assert name in lora_lightning.__all__
    for path in re.findall(r"`((?:tests|configs|notebooks|\.ci)/[\w./]+)`", README):
        assert (REPOSITORY / path).exists(), path
