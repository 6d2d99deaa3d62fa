"""The house stands as designed: floors, import weight, file sizes, public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lightning

PACKAGE = Path(lora_lightning.__file__).parent

# The packages from the bottom up: each imports itself and those before it, never one behind it.
PACKAGES = [
    "errors", "utilities", "adapters", "layers", "engine", "checkpoint", "training", "callback",
    "tasks", "data", "callbacks", "cli",
]  # fmt: skip

# The same within data/: what a folder holds knows nothing of those behind it.
DATA = ["sources", "samples", "encoding", "batches"]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def height(package: str) -> int:
    return PACKAGES.index(package)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("lora_lightning.")
        ):
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts
    if own == ("__init__",):
        return  # public names, loaded when they are used
    for imported in imports(path):
        package = imported.split(".")[1]
        assert height(package) <= height(own[0]), f"{'/'.join(own)} imports {imported}"


@pytest.mark.parametrize("folder", DATA)
def test_data_goes_from_sources_to_batches(folder: str) -> None:
    alone = {"hold_out"}  # of no folder: what is held out is asked in all of them
    for path in (PACKAGE / "data" / folder).glob("*.py"):
        for imported in imports(path):
            if imported.startswith("lora_lightning.data."):
                room = imported.split(".")[2]
                assert room in {*DATA[: DATA.index(folder) + 1], *alone}, (
                    f"{path} imports {imported}"
                )


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_two_rooms(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


ENGINE = (
    "errors utilities.autocast adapters.config adapters.initialization adapters.registry "
    "layers.registry engine.targets.selection engine.bias engine.injection engine.switching "
    "engine.merging"
)
HEAVY = [
    "bitsandbytes", "torchao", "lightning", "pytorch_lightning", "transformers", "torchmetrics", "jsonargparse", "rich",
]  # fmt: skip


def heavy_after(statements: str) -> list[str]:
    code = f"{statements}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_engine_needs_torch_only() -> None:
    imported = "\n".join(f"import lora_lightning.{name}" for name in ENGINE.split())
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


def test_the_import_test_can_fail() -> None:
    assert "rich" in heavy_after("import lora_lightning.training.summary")


def test_every_public_name_is_there() -> None:
    for name in lora_lightning.__all__:
        assert getattr(lora_lightning, name).__name__ == name
    assert set(lora_lightning.__all__) <= set(dir(lora_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lora_lightning.nothing


def test_every_public_name_is_documented() -> None:
    for name in lora_lightning.__all__:
        assert getattr(lora_lightning, name).__doc__, name
