"""The pages of the repository: there is one where it is needed, and what they name exists."""

from __future__ import annotations

import ast
import pydoc
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lora_lightning
from lora_lightning import LoraCallback, inject_adapter, save_adapter
from lora_lightning.checkpoint.state_dict import KEY
from tests.helpers.adapter_types import TABLE as PARITY
from tests.helpers.adapter_types import TYPES
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.markdown import PAGES, anchors, blocks, linked, rows
from tests.helpers.paths import PACKAGES, ROOT

ADAPTERS = "lora_lightning/adapters/README.md"
CHECKPOINT = "lora_lightning/checkpoint/README.md"
FOLDERS = [
    "configs", "lora_lightning/adapters", "lora_lightning/checkpoint", "lora_lightning/data",
    "lora_lightning/engine", "lora_lightning/examination", "lora_lightning/layers", "lora_lightning/tasks",
    "lora_lightning/training", "configs/coming_from", "notebooks", "tests/benchmarks",
    *(f"lora_lightning/verbs/{verb}" for verb in ("export", "generate", "inspect", "merge", "plan", "preview", "report")),
]  # fmt: skip
# What a page may name that is not here: the reader's own.
YOURS = {"my_module.py", "last.ckpt", "config.yaml"}
# The changelog names what there was.
CURRENT = [page for page in PAGES if page != "CHANGELOG.md"]


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_its_page(folder: str) -> None:
    title, blank, first, *_ = PAGES[f"{folder}/README.md"].splitlines()
    assert title.startswith("# ")
    assert not blank
    assert re.match(r"[A-Z]", first), "it begins with what a reader can do"


def test_the_readme_leads_to_every_page() -> None:
    found = {path.resolve() / "README.md" for path, _ in linked("README.md") if path.is_dir()}
    found |= {path.resolve() for path, _ in linked("README.md")}
    assert {(ROOT / page).resolve() for page in PAGES} - found == {ROOT / "README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for path, anchor in linked(page):
        assert path.exists(), path
        if anchor:
            assert anchor in anchors(path.read_text()), f"{path}#{anchor}"


def exists(page: str, name: str) -> bool:
    """Whether a file or folder of that name is in the repository, or below the page's folder."""
    folders = ("", Path(page).parent, "lora_lightning", "lora_lightning/data", "tests")
    return any((ROOT / folder / name).exists() for folder in folders)


@pytest.mark.parametrize("page", CURRENT)
def test_files_that_are_named_exist(page: str) -> None:
    for name in re.findall(r"`([\w./-]+)`", PAGES[page]):
        is_file = re.search(r"\.(py|yaml|ipynb|sh|sbatch|md|toml|txt)$", name)
        in_folder = re.match(r"(lora_lightning|tests|configs|notebooks|\.ci)/", name)
        if (is_file or in_folder or name.endswith("/")) and name not in YOURS:
            assert exists(page, name), name


def test_a_file_that_is_not_there_is_noticed() -> None:
    assert exists("README.md", "tests/test_readme.py")
    assert not exists("README.md", "lora_lightning/cli.py")


@pytest.mark.parametrize("page", CURRENT)
def test_dotted_names_exist(page: str) -> None:
    for name in re.findall(r"\blora_lightning(?:\.\w+)+", PAGES[page]):
        assert pydoc.locate(name) is not None, name


@pytest.mark.parametrize("page", CURRENT)
def test_imported_names_are_public(page: str) -> None:
    for _, code in blocks("python", page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "lora_lightning":
                assert {alias.name for alias in node.names} <= {*lora_lightning.__all__}


def test_public_names_of_the_tables() -> None:
    tables = [("README.md", "config"), (ADAPTERS, "config"), ("lora_lightning/engine/README.md", "function"), ("lora_lightning/data/README.md", "data module")]  # fmt: skip
    for page, head in tables[:1] + tables[2:]:
        for row in rows(page, head):
            names = re.findall(r"`(\w+)`", row[0])
            assert names
            assert {*names} <= {*lora_lightning.__all__}


def test_the_map_has_every_package() -> None:
    table = rows("CONTRIBUTING.md", "in `lora_lightning/`")
    assert [row[0].strip("`/").removesuffix(".py") for row in table] == PACKAGES


def test_every_config_is_listed() -> None:
    table = rows("configs/README.md", "config")
    there = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert {row[0].strip("`") for row in table} == there
    for path in (ROOT / "configs").glob("*/*"):
        assert f"`{path.parent.name}/{path.name}`" in PAGES["configs/README.md"]


def test_every_benchmark_and_notebook_is_listed() -> None:
    for path in (ROOT / "tests/benchmarks").glob("*.py"):
        assert f"python tests/benchmarks/{path.name}" in PAGES["tests/benchmarks/README.md"]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"]({path.name})" in PAGES["notebooks/README.md"]


# -- adapters, against the table that test_parity runs ----------------------------------------------

KINDS = {
    "Linear, Conv1D (GPT-2)": ("linear", "conv1D"),
    "Conv1d, 2d, 3d": ("conv1d", "conv2d", "conv3d"),
    "Embedding": ("embed",),
    "MultiheadAttention": ("mha",),
    "Linear in 4 or 8 bits": ("nf4", "int8", "torchao"),
}
ROWS = {
    "(LoRA, rsLoRA, `lora_bias`)": ("lora", "rslora"),
    "`use_dora`": ("dora",),
    '`"pissa"`': ("pissa", "olora"),
    "`AdaLoraConfig`": ("adalora",),
    "`LohaConfig`, `LokrConfig`": ("loha", "loha_cp", "lokr", "lokr_cp"),
    "`OftConfig`": ("oft",),
    "`Ia3Config`": ("ia3", "ia3_inputs"),
    "`ShiraConfig`, `VeraConfig`": ("shira", "vera"),
}


def test_what_adapters_sit_on() -> None:
    header, *lines = [line.split() for line in PARITY.strip().splitlines()]
    known = {(line[0], kind): cell != "-" for line in lines for kind, cell in zip(header, line[1:], strict=True)}  # fmt: skip
    heads = re.search(r"^\| config \| (Linear.*) \|$", PAGES[ADAPTERS], re.MULTILINE)[1].split(
        " | "
    )  # type: ignore[index]
    assert heads == list(KINDS)
    table = PAGES[ADAPTERS].partition("| config | Linear")[2].split("\n\n")[0]
    for words, types in ROWS.items():
        (line,) = (line for line in table.splitlines() if words in line)
        for kind, cell in zip(KINDS, line.strip("| ").split(" | ")[1:], strict=True):
            here = {known[t, k] for t in types for k in KINDS[kind]}
            assert here == {cell != "-"}, (words, kind)
            if kind == "Conv1d, 2d, 3d" and cell != "-":
                assert all(known[t, "grouped"] == (cell == "yes") for t in types), words


def test_peft_names_of_adapters(tmp_path: Path) -> None:
    table = PAGES[ADAPTERS].partition("| config | file |")[2].split("\n\n")[0].splitlines()[2:]
    options = dict(reversed(TYPES.values()))
    assert len(table) == len(options)
    for line in table:
        config, _, peft_type, tensors = (c.strip() for c in line.strip("|").split("|"))
        kind = getattr(lora_lightning, config.strip("`"))
        assert peft_type == f"`{kind.peft_type}`"
        model = nn.Sequential(nn.Linear(8, 8))
        plain = {k: v for k, v in options[config.strip("`")].items() if k != "feedforward_modules"}
        inject_adapter(model, kind(**plain))
        save_adapter(model, folder := tmp_path / kind.peft_type)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            keys = {key.removeprefix("base_model.").removeprefix("model.0.") for key in file.keys()}  # noqa: SIM118
        assert keys == {*re.findall(r"`([\w.]+)`", tensors)}


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LoraCallback(r=2))
    trainer.fit(Net(), Data())
    for weights_only in (False, True):
        trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
        entries = torch.load(tmp_path / "x.ckpt", weights_only=True)[KEY].keys()
        table = rows(CHECKPOINT, "entry of `lora_lightning`")
        assert entries == {name for row in (table[:-2] if weights_only else table) for name in re.findall(r"`(\w+)`", row[0])}  # fmt: skip
