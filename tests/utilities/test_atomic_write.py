"""Files and folders are replaced as a whole, whenever the process is killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder
from lora_lightning.training.strategies.sharded_files import save_sharded_checkpoint
from lora_lightning.utilities import atomic_write
from lora_lightning.utilities.atomic_write import exchange, write_atomically


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
        lightning_module = None

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


def test_drafts_are_not_written_through_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, draft = tmp_path / "victim", tmp_path / "draft"
    victim.write_text("precious")
    for target in (victim, tmp_path / "nothing there yet"):
        draft.symlink_to(target)  # as if the name had been guessed
        monkeypatch.setattr(atomic_write, "_beside", lambda path, ending: draft)
        with pytest.raises(FileExistsError):
            write_atomically({tmp_path / "new": b"new"})
        draft.unlink(missing_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "precious"


def test_what_is_kept_aside_is_not_written_through_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, old = tmp_path / "victim", tmp_path / "old"
    victim.write_text("precious")
    old.write_text("old")
    (tmp_path / "place").symlink_to(victim)

    def no_links(*_: Any) -> None:
        raise OSError("as on a file system without links")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FileExistsError):
        atomic_write._keep(old, tmp_path / "place")
    assert victim.read_text() == "precious"
    atomic_write._keep(old, tmp_path / "other")
    assert (tmp_path / "other").read_text() == "old"


def test_names_of_drafts_cannot_be_guessed(tmp_path: Path) -> None:
    names = {atomic_write._beside(tmp_path / "a", "tmp").name for _ in range(100)}
    assert len(names) == 100
    assert all(str(os.getpid()) != name.split("-")[1].split(".")[0] for name in names)


def test_files_have_the_permissions_that_open_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically({tmp_path / "ours": b""})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
