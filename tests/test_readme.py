"""What the README shows works as it stands there."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import yaml

import lora_lightning
from lora_lightning import (
    LoraCallback,
    LoraConfig,
    active_adapters,
    adapter_names,
    inject_adapter,
    save_adapter,
)
from lora_lightning.cli.main import LoraCLI
from lora_lightning.data import TextDataModule
from lora_lightning.errors import CheckpointError
from lora_lightning.tasks.pretrained_task import PretrainedTask
from tests.helpers.lightning_modules import Data, Net
from tests.helpers.paths import ROOT
from tests.helpers.tiny_lm import tiny_llama

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    own_code, engine, many = (
        block for block in blocks("python") if "import" in block and "CausalLM" not in block
    )
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


def test_language_model(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(60)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (code,) = (block for block in blocks("python") if "CausalLM" in block)
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    assert code.count(name) == code.count("L.Trainer(") == 1
    code = code.replace(name, str(tiny_llama(tmp_path / "model", max_position_embeddings=1024)))
    options = "accelerator='cpu', enable_progress_bar=False, "
    exec(code.replace("L.Trainer(", f"L.Trainer({options}"), {})
    shown = "".join(capsys.readouterr())
    assert re.search(r"val_loss +│ +\d", shown)
    assert "expected" in shown  # of TextSamples
    (samples,) = Path("lightning_logs").rglob("samples.jsonl")
    assert samples.read_text()


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


class ParseOnly(LoraCLI):
    """Takes the command's options, makes everything but the Trainer, and does nothing."""

    def instantiate_classes(self) -> None:
        self.parser.instantiate_classes(self.config)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


CALLS = [
    line
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("lora-lightning")
]


def test_there_are_calls() -> None:
    assert len(CALLS) == 10


@pytest.mark.parametrize("call", CALLS)
def test_commands_parse(call: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Every `lora-lightning` call in the README is one that the parser takes."""
    words = shlex.split(call)
    assert words[1] in {"fit", "validate", "test", "predict"}
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (mine,) = (block for block in blocks("yaml") if "my_module" in block)
    mine = mine.replace("my_module.MyModel", "tests.helpers.lightning_modules.Net").replace(
        "my_module.MyData", "tests.helpers.lightning_modules.Data"
    )
    (tmp_path / "mine.yaml").write_text(mine)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            ParseOnly()
    elif "--ckpt_path" in words:  # which is looked for once all else is known to be right
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            ParseOnly()
    else:
        ParseOnly()


@pytest.mark.parametrize("config", blocks("yaml"))
def test_yaml_is_accepted(config: str, tmp_path: Path, monkeypatch: Any) -> None:
    content = yaml.safe_load(config)
    for section in ("model", "data"):  # the user's own classes
        if "my_module" in content.get(section, {"class_path": "my_module"})["class_path"]:
            content[section] = {
                "class_path": {
                    "model": "tests.helpers.lightning_modules.Net",
                    "data": "tests.helpers.lightning_modules.Data",
                }[section]
            }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora-lightning", "fit", "--config", "c.yaml"])
    ParseOnly()


def test_setup_commands_are_one_line_each() -> None:
    setup = [block.strip() for block in blocks("bash") if "venv" in block]
    assert len(setup) == 2
    assert all("\n" not in command for command in setup)
    assert setup[0].endswith("lora-lightning fit --config configs/quickstart.yaml")
    assert setup[1].endswith("""/pytest -m "not soak\"""")


def test_the_readme_and_ci_run_every_test_once() -> None:
    calls = re.findall(r'/pytest"? -m (?:"([^"]+)"|(\w+))', README + (ROOT / ".ci/run").read_text())
    selections = [quoted or word for quoted, word in calls]
    assert len(selections) == 2
    for markers in itertools.product([False, True], repeat=3):
        marked = dict(zip(("slow", "soak", "gpu"), markers, strict=True))
        assert sum(eval(selection, {}, marked) for selection in selections) == 1, marked


def test_figures_and_names_are_current() -> None:
    for name in re.findall(r"from lora_lightning import (\w+)", README):
        assert name in lora_lightning.__all__
    for path in re.findall(r"`((?:tests|configs|notebooks|\.ci)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("head", "owner"),
    [("option", PretrainedTask), ("`TextDataModule`", TextDataModule)],
)
def test_options_of_the_tables(head: str, owner: Any) -> None:
    rows = README.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`(\w+)", row.split("|")[1])}
    assert len(named) >= 8
    assert named <= set(inspect.signature(owner).parameters)


def test_metrics_of_the_table() -> None:
    rows = README.split("| `lora_lightning.tasks` |")[1].split("\n\n")[0].splitlines()[2:]
    for row in rows:
        task, data, metrics = (re.findall(r"`(\w+)`", cell) for cell in row.split("|")[1:4])
        assert issubclass(getattr(lora_lightning.tasks, task[0]), PretrainedTask)
        assert hasattr(lora_lightning.data, data[0])
        text = getattr(lora_lightning.tasks, task[0]).__doc__
        assert all(f"`{metric}`" in text for metric in metrics), metrics
