"""The package is built as designed: one-way, light imports; short files, functions, signatures."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

import lora_lightning
from tests.helpers.paths import PACKAGES

PACKAGE = Path(lora_lightning.__file__).parent
TESTS = Path(__file__).parent

# The same within data/: what a folder holds knows nothing of those behind it.
DATA = ["sources", "samples", "encoding", "batches"]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """The name under which a file of the package is imported."""
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """All that a file imports of the package, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name.startswith("lora_lightning.")}
    return found


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports. Packages that load names lazily are left out."""
    files = {dotted(path): path for path in modules()}
    lazy = {name for name, path in files.items() if "lazy_names(" in path.read_text()} - {
        "lora_lightning.utilities.lazy_imports"
    }
    return {
        name: (imports(path) & files.keys()) - lazy - {name}
        for name, path in files.items()
        if name not in lazy
    }


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A way from a module back to itself, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for imported in sorted(graph.get(name, ())):
            if found := visit(imported, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts
    if own == ("__init__",):
        return  # public names, loaded when they are used
    for imported in imports(path):
        package = imported.split(".")[1]
        if package in PACKAGES:
            assert PACKAGES.index(package) <= PACKAGES.index(own[0]), f"{path} imports {imported}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert not cycle(import_graph())


def test_the_search_for_cycles_can_fail() -> None:
    graph = import_graph()
    graph["lora_lightning.errors"] = {"lora_lightning.cli.main"}  # the bottom imports the top
    found = cycle(graph)
    assert found[0] == found[-1]
    assert {"lora_lightning.errors", "lora_lightning.cli.main"} <= {*found}


@pytest.mark.parametrize("folder", DATA)
def test_data_goes_from_sources_to_batches(folder: str) -> None:
    alone = {"validation_split"}  # of no folder: what is held out is asked in all of them
    for path in (PACKAGE / "data" / folder).glob("*.py"):
        for imported in imports(path):
            if imported.startswith("lora_lightning.data."):
                part = imported.split(".")[2]
                assert part in {*DATA[: DATA.index(folder) + 1], *alone}, (
                    f"{path} imports {imported}"
                )


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


# The functions that may have more than seven parameters, and why.
WIDE = {
    "LoraCallback.__init__": "options of the command line, --lora",
    "ImageDataModule.__init__": "options of the command line, --data",
    "TextDataModule.__init__": "options of the command line, --data",
    "TextClassificationDataModule.__init__": "options of the command line, --data",
    "TokenClassificationDataModule.__init__": "options of the command line, --data",
    "PretrainedTask.__init__": "options of the command line, --model",
    "generate": "options of the command line, lora-lightning generate",
    "add_weighted_adapter": "PEFT's signature",
    "AdaptedMultiheadAttention.forward": "torch's signature",
    "merge": "options of the command line",
    "export": "options of the command line",
}


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of a module, methods and inner ones too, by its qualified name."""
    for node in ast.iter_child_nodes(tree):
        name = f"{owner}{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef):
            yield name, node
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        yield from functions(node, f"{name}." if named else owner)


def too_long(tree: ast.AST) -> list[str]:
    """The functions of more than 60 lines, their docstrings included."""
    return [
        name
        for name, function in functions(tree)
        if cast(int, function.end_lineno) - function.lineno >= 60
    ]


def too_wide(tree: ast.AST) -> list[str]:
    """The functions of more than seven parameters, `self` and `cls` not counted."""
    found = []
    for name, function in functions(tree):
        signature = function.args
        parameters = (*signature.posonlyargs, *signature.args, *signature.kwonlyargs)
        if sum(parameter.arg not in ("self", "cls") for parameter in parameters) > 7:
            found.append(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_and_signatures_stay_short(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert too_long(tree) == []
    assert [name for name in too_wide(tree) if name not in WIDE] == []


def test_every_exception_is_needed() -> None:
    found = [name for path in modules() for name in too_wide(ast.parse(path.read_text()))]
    assert WIDE.keys() <= {*found}


def test_the_search_for_long_functions_can_fail() -> None:
    body = "\n".join(["        pass"] * 60)
    tree = ast.parse(f"class A:\n    def f(self):\n{body}\n    def g(self):\n        pass")
    assert too_long(tree) == ["A.f"]


def test_the_search_for_wide_signatures_can_fail() -> None:
    methods = "class A:\n def f(self, a, b, c, /, d, e, *, f, g): ...\n"
    tree = ast.parse(methods + "def outer():\n def inner(a, b, c, d, /, e, *, f, g, h): ...\n")
    assert too_wide(tree) == ["outer.inner"]


# All of these packages need torch only.
LIGHT = [
    dotted(path)
    for path in modules()
    if path.relative_to(PACKAGE).parts[0]
    in ("errors.py", "utilities", "adapters", "layers", "engine")
]
HEAVY = [
    "bitsandbytes", "torchao", "lightning", "pytorch_lightning", "transformers", "torchmetrics", "jsonargparse", "rich",
]  # fmt: skip


def heavy_after(statements: str) -> list[str]:
    code = f"{statements}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_engine_needs_torch_only() -> None:
    imported = "\n".join(f"import {name}" for name in LIGHT)
    working = (
        "import torch\nfrom lora_lightning import inject_adapter, LoraConfig, merge_and_unload\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "inject_adapter(net, LoraConfig(r=2))\nmerge_and_unload(net)"
    )
    assert heavy_after(f"{imported}\n{working}") == []


def test_package_import_is_light() -> None:
    code = "import lora_lightning, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_the_import_test_can_fail() -> None:
    assert "rich" in heavy_after("import lora_lightning.training.summary")


def test_every_public_name_is_there() -> None:
    aliases = {
        "IA3Config",
        "LoHaConfig",
        "LoKrConfig",
        "OFTConfig",
        "LoftQConfig",
    }  # PEFT's spelling
    for name in lora_lightning.__all__:
        own = getattr(lora_lightning, name).__name__
        assert own == name or (name in aliases and own.lower() == name.lower())
    assert set(lora_lightning.__all__) <= set(dir(lora_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lora_lightning.nothing


def test_every_public_name_is_documented() -> None:
    for name in lora_lightning.__all__:
        assert getattr(lora_lightning, name).__doc__, name


OF_THE_PROJECT = {"architecture", "markdown", "readme"}  # tests of no package
OTHER_FOLDERS = {"helpers", "integration"}


def misplaced(file: str) -> bool:
    """True if a test file's folder, or at the root its name, is not one of the package's."""
    *folders, name = file.split("/")
    if folders:
        return len(folders) > 1 or folders[0] not in {*PACKAGES, *OTHER_FOLDERS}
    return name.removeprefix("test_").removesuffix(".py") not in {*PACKAGES, *OF_THE_PROJECT}


def test_tests_mirror_the_package() -> None:
    files = [str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")]
    assert len(files) > 80
    assert [file for file in files if misplaced(file)] == []
    assert all(misplaced(file) for file in ("test_fsdp.py", "models/test_fsdp.py"))


def test_tests_share_by_helpers_only() -> None:
    def imported(code: str) -> list[str]:
        nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
        return [node.module or "" for node in nodes if "test_" in (node.module or "")]

    assert imported("from tests.layers.test_experts import net") == ["tests.layers.test_experts"]
    assert {str(path) for path in TESTS.rglob("*.py") if imported(path.read_text())} == set()
