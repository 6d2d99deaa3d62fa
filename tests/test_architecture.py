"""The house stands as designed: floors, import weight, file sizes, public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lightning

PACKAGE = Path(lora_lightning.__file__).parent

# Which floor a room is on; imports go to the same floor or below.
FLOORS = {
    "errors": 0, "lazy": 0, "config": 0, "compiled": 0, "sharding": 0, "autocast": 0,
    "initialization": 1, "adapters": 1, "hosts": 1, "targets": 1, "target_names": 1, "target_rules": 1, "target_checks": 1, "target_parameters": 1, "embeddings": 1, "bias": 1, "frozen_norms": 1,
    "injection": 2, "construction": 2, "switching": 2, "merging": 2, "combine": 2, "task_arithmetic": 2, "eva": 2,
    "rank_allocation": 2, "loftq": 2,
    "checkpoint": 3, "fingerprint": 3, "optim": 3, "report": 3, "rng": 3, "status": 3, "predictions": 3,
    "peft_format": 3, "peft_config": 3, "peft_keys": 3, "peft_selection": 3, "hotswap": 3,
    "adapter_files": 3, "checkpoint_folders": 3, "atomic_write": 3, "content_hash": 3,
    "training": 4, "callback": 4,
    "tasks": 5, "data": 5, "callbacks": 5,
    "cli": 6, "cli_parser": 6, "noise": 6, "__main__": 6,
}  # fmt: skip


# The same within data/: what a folder holds knows nothing of those behind it.
DATA = ["sources", "samples", "encoding", "batches"]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def floor(dotted: str) -> int:
    return FLOORS[dotted.split(".")[1]]


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
    room = path.relative_to(PACKAGE).with_suffix("").parts
    if room == ("__init__",):
        return  # the lazy front door
    for imported in imports(path):
        assert floor(imported) <= FLOORS[room[0]], f"{'/'.join(room)} imports {imported}"


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
    "autocast config errors initialization adapters hosts targets bias injection switching merging"
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
    assert "rich" in heavy_after("import lora_lightning.report")


def test_every_public_name_is_there() -> None:
    for name in lora_lightning.__all__:
        assert getattr(lora_lightning, name).__name__ == name
    assert set(lora_lightning.__all__) <= set(dir(lora_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lora_lightning.nothing


def test_every_public_name_is_documented() -> None:
    for name in lora_lightning.__all__:
        assert getattr(lora_lightning, name).__doc__, name
