"""Files and folders are replaced as a whole, whenever the process is killed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder
from lora_lightning.training.strategies.sharded_files import save_sharded_checkpoint
from lora_lightning.utilities.atomic_write import exchange


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges names in one step")
def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        folder.mkdir()
        (folder / folder.name).write_text(folder.name)
    assert exchange(new, old)
    assert [file.name for file in old.iterdir()] == ["new"]
    assert [file.name for file in new.iterdir()] == ["old"]
    assert not exchange(new, tmp_path / "nobody")
    assert [file.name for file in new.iterdir()] == ["old"]


def test_a_folder_stays_where_the_file_that_is_to_replace_it_fails(tmp_path: Path) -> None:
    class Failing:
        is_global_zero, world_size, _save_distributed_checkpoint = True, 1, False

        def broadcast(self, value: Any) -> Any:
            return value

        def save_checkpoint(self, *args: Any) -> None:
            raise OSError("No space left on device")

    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    for name in ("meta.pt", ".metadata"):
        (folder / name).write_text("here")
    with pytest.raises(OSError, match="No space left"):
        save_sharded_checkpoint(Failing(), nn.Module(), {}, folder)
    assert is_checkpoint_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
