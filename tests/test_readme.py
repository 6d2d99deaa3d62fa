"""What README.md and the pages of the folders show works as it stands there."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import lightning as L
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
from lora_lightning.cli import verbs
from lora_lightning.cli.lora_cli import LoraCLI
from lora_lightning.cli.main import main
from lora_lightning.data import TextDataModule
from lora_lightning.data.samples.formats import FORMATS
from lora_lightning.errors import CheckpointError
from lora_lightning.tasks.pretrained_task import PretrainedTask
from tests.helpers.lightning_modules import Data, Net
from tests.helpers.markdown import PAGES, blocks, rows
from tests.helpers.paths import ROOT
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_lm import tiny_llama

README = PAGES["README.md"]
TASKS, DATA = "lora_lightning/tasks/README.md", "lora_lightning/data/README.md"
LLAMA, BERT = "Qwen/Qwen2.5-0.5B-Instruct", "google-bert/bert-base-uncased"


@pytest.fixture(autouse=True)
def readers_folder(tmp_path: Path, monkeypatch: Any) -> None:
    """The reader's files, in the folder where everything runs."""
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(60)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{number} was {how},{how}" for number in range(30) for how in ("good", "bad")]
    (tmp_path / "my.csv").write_text("\n".join(["text,label", *lines]))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    mine = types.ModuleType("my_module")
    mine.MyModel, mine.MyData = Net, Data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_module", mine)
    monkeypatch.chdir(tmp_path)


# -- Python ----------------------------------------------------------------------------------------

# Blocks with a test of their own, each by words that no other has. CONTRIBUTING's are tested as
# examples of what they extend (test_extension.py in the tests of adapters, layers, tasks, data).
CHECKED = [
    "class Regressor",
    "merge_and_unload(model)",
    "adapters_per_row(",
    "CausalLM(",
    "init_from=",
]
OTHERS = [
    pytest.param(code, id=f"{page}-{number}")
    for number, (page, code) in enumerate(blocks("python"))
    if page != "CONTRIBUTING.md" and not any(words in code for words in CHECKED)
]


def checked(words: str) -> str:
    (code,) = (
        code for page, code in blocks("python") if words in code and page != "CONTRIBUTING.md"
    )
    return code


def execute(code: str, **options: Any) -> dict[str, Any]:
    """Run a block, with tiny models in place of those on the hub; `options` are the Trainer's."""
    if LLAMA in code:
        code = code.replace(LLAMA, str(tiny_llama(Path("llama"), max_position_embeddings=1024)))
    if BERT in code:
        code = code.replace(BERT, str(save_tiny_bert(Path("bert"))))
        code = code.replace('"my.csv"', '"my.csv", max_length=32')
    given = "".join(f"{name}={value!r}, " for name, value in options.items())
    names: dict[str, Any] = {}
    exec(code.replace("L.Trainer(", f"L.Trainer({given}"), names)
    return names


def test_your_own_module() -> None:
    names = execute(checked("class Regressor"))
    assert len(names["predictions"]) == 8
    assert Path(names["best"]).is_file()
    assert names["longer"].current_epoch == 5


def test_engine() -> None:
    names = execute(checked("merge_and_unload(model)"))
    assert type(names["model"][0]).__name__ == "Linear"


def test_many_adapters() -> None:
    names = execute(checked("adapters_per_row("))
    assert adapter_names(names["fresh"]) == ["style"]
    assert sorted(p.name for p in Path("adapters/all").iterdir() if p.is_dir()) == [
        "style",
        "topic",
        "turn",
    ]


def test_language_model(capsys: Any) -> None:
    code = checked("CausalLM(")
    assert code.count(LLAMA) == code.count("L.Trainer(") == 1
    execute(code, accelerator="cpu", enable_progress_bar=False)
    shown = "".join(capsys.readouterr())
    assert re.search(r"val_loss +│ +\d", shown)
    assert "expected" in shown  # of TextSamples
    (samples,) = Path("lightning_logs").rglob("samples.jsonl")
    assert samples.read_text()


def test_two_callbacks() -> None:
    base = Net()
    inject_adapter(base, LoraConfig(r=2), "style")
    save_adapter(base, "adapters/style", "style")
    quiet = {"enable_checkpointing": False, "logger": False, "accelerator": "cpu"}
    names = execute(checked("init_from=").replace("r=8", "r=2"), max_epochs=1, **quiet)
    names["trainer"].fit(module := Net(), Data())
    assert active_adapters(module) == ["style", "topic"]


@pytest.mark.parametrize("code", OTHERS)
def test_python_runs(code: str) -> None:
    names = execute(code, accelerator="cpu", enable_progress_bar=False)
    if "trainer" in names:
        assert names["trainer"].current_epoch == names["trainer"].max_epochs
    if "metrics" in names:
        assert names["metrics"]["val_loss"] > 0
    if "module" in names:
        assert adapter_names(names["module"]) == ["default"]


# -- commands and YAML -----------------------------------------------------------------------------


class ParseOnly(LoraCLI):
    """Takes the command's options, makes everything but the Trainer, and does nothing."""

    def instantiate_classes(self) -> None:
        self.made = self.parser.instantiate_classes(self.config)[self.subcommand]

    def _run_subcommand(self, subcommand: str) -> None:
        pass


LINES = [line for _, block in blocks("bash") for line in block.splitlines()]
CALLS = [line for line in LINES if line.startswith("lora-lightning")]


def test_there_are_calls() -> None:
    assert len(CALLS) >= 18


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_commands_parse(call: str, monkeypatch: Any) -> None:
    """Every `lora-lightning` call of a page is one that the parser takes."""
    words = shlex.split(call, comments=True)
    if words[1] in verbs.VERBS:
        verbs.parsed(words[1], getattr(lora_lightning, words[1]), tuple(words[2:]))
        return
    if words[1] == "configs":
        main(words[1:])
        return
    assert words[1] in {"fit", "validate", "test", "predict", "examine", "preview", "plan"}
    (mine,) = (block for _, block in blocks("yaml") if "runs/mine" in block)
    Path("mine.yaml").write_text(mine)
    if words[2].startswith("runs/"):  # whose config is the one that made it
        name = words[2].removeprefix("runs/")
        words[2:3] = ["--config", "mine.yaml" if name == "mine" else f"configs/{name}.yaml"]
    monkeypatch.setattr(sys, "argv", words)
    if any(word.endswith(("-help", ".help")) for word in words):
        with pytest.raises(SystemExit, match=r"^0$"):
            ParseOnly()
    elif "--ckpt_path" in words:  # which is looked for once all else is known to be right
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            ParseOnly()
    else:
        made = ParseOnly().made
        assert isinstance(made.model, L.LightningModule)
        assert isinstance(made.data, L.LightningDataModule)


@pytest.mark.parametrize("config", [config for _, config in blocks("yaml")])
def test_yaml_is_accepted(config: str, monkeypatch: Any) -> None:
    content = {
        "model": {"class_path": "my_module.MyModel"},
        "data": {"class_path": "my_module.MyData"},
        **yaml.safe_load(config),
    }
    Path("c.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["lora-lightning", "fit", "--config", "c.yaml"])
    cli = ParseOnly()
    given = cli.config[cli.subcommand]
    assert all(given[section] is not None for section in content)
    assert isinstance(cli.made.model, L.LightningModule)


def test_setup_commands_are_one_line_each() -> None:
    setup = [block.strip() for _, block in blocks("bash") if "venv" in block]
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


def test_other_commands() -> None:
    """Benchmarks are there and have the options that they are called with."""
    others = [line for line in LINES if line not in CALLS and "venv" not in line]
    assert others.pop(0) == "pip install ."
    for line in others:
        script, *options = line.removeprefix("OMP_NUM_THREADS=1 ").removeprefix("python ").split()
        text = (ROOT / script).read_text()
        assert all(f'"{word}"' in text for word in options if word.startswith("--")), line


def test_extras_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for text in PAGES.values():
        for extras in re.findall(r"(?:pip install \"lora_lightning|\"\.)\[([\w,]+)\]\"", text):
            assert all(f"\n{extra} = [" in project for extra in extras.split(",")), extras


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "head", "owner"),
    [
        (TASKS, "option", PretrainedTask),
        (DATA, "`TextDataModule`", TextDataModule),
        ("lora_lightning/adapters/README.md", "`LoraCallback`", LoraCallback),
    ],
)
def test_options_of_the_tables(page: str, head: str, owner: Any) -> None:
    named = {name for row in rows(page, head) for name in re.findall(r"`(\w+)", row[0])}
    assert len(named) >= 8
    assert named <= set(inspect.signature(owner).parameters)


def test_options_that_adapters_share() -> None:
    table = rows("lora_lightning/adapters/README.md", "option")
    named = {name for row in table for name in re.findall(r"`(\w+)`", row[0])}
    assert named == {field.name for field in dataclasses.fields(lora_lightning.AdapterConfig)}


def test_options_of_the_callback_are_complete() -> None:
    table = rows("lora_lightning/adapters/README.md", "`LoraCallback`")
    own = set(inspect.signature(LoraCallback).parameters) - {"config"}
    lora = {field.name for field in dataclasses.fields(LoraConfig)}
    assert {row[0].strip("`") for row in table} == own - lora - {"config_options", "options"}


def test_metrics_of_the_table() -> None:
    for row in rows(TASKS, "`lora_lightning.tasks`"):
        task, data, metrics = (re.findall(r"`(\w+)`", cell) for cell in row)
        assert issubclass(getattr(lora_lightning.tasks, task[0]), PretrainedTask)
        assert hasattr(lora_lightning.data, data[0])
        text = getattr(lora_lightning.tasks, task[0]).__doc__
        assert all(f"`{metric}`" in text for metric in metrics), metrics


def test_formats_of_the_table() -> None:
    table = {row[0].strip("`"): row[1] for row in rows(DATA, "format")}
    assert table.keys() == FORMATS.keys()
    for name, form in FORMATS.items():
        assert all(f"`{column}`" in table[name] for column in form.required), name
