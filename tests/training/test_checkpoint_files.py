"""Checkpoint files: whole or not there, checked when read, the old one kept whatever happens."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import nn

from lora_lightning import LoraCallback, LoraConfig, inject_adapter, load_adapter, save_adapter
from lora_lightning.checkpoint.integrity import (
    content_hash,
    content_hashes,
    damaged_parts,
    with_hashes,
)
from lora_lightning.errors import CheckpointError
from lora_lightning.training.checkpoint_io import files as checkpoint_files
from lora_lightning.training.checkpoint_io.files import DurableCheckpointIO, newest_good
from lora_lightning.utilities import atomic_write
from lora_lightning.utilities.atomic_write import link_atomically, write_atomically
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.tensors import adapter_tensors, assert_same_state

OPTIONS: dict[str, Any] = {
    "r": 2,
    "lora_dropout": 0.2,
    "target_modules": ["embed", "body.2"],
    "modules_to_save": ["head"],
}


def fit(folder: Path, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    seed_everything(7, verbose=False)
    module = Net()
    trainer = make_trainer(folder, LoraCallback(**OPTIONS), *callbacks, **options)
    trainer.fit(module, Data(), ckpt_path=ckpt_path)
    return trainer


def adapters(trainer: Any) -> dict[str, Any]:
    return {k: v for k, v in trainer.model.state_dict().items() if ".adapters." in k}


def same_content(first: Any, second: Any) -> bool:
    return content_hash(first) == content_hash(second)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    fit(folder).save_checkpoint(folder / "good.ckpt")
    return folder / "good.ckpt"


def load(path: Path, **options: Any) -> None:
    """Evaluate the checkpoint with a new module, which must have its tensors then."""
    module = Net()
    make_trainer(path.parent, LoraCallback(**OPTIONS), **options).validate(
        module, Data(), ckpt_path=str(path), verbose=False
    )
    if path.is_file():
        wanted = torch.load(path, weights_only=True)["state_dict"]
        assert_same_state(adapter_tensors(module), wanted)


# -- the hash ------------------------------------------------------------------------------------


def test_a_checkpoint_carries_its_hashes(good: Path) -> None:
    for weights_only in (True, False):
        content = torch.load(good, weights_only=weights_only)
        hashes = content["lora_lightning"]["content"]
        assert hashes == content_hashes(content)
        assert damaged_parts(content) == []
    tensors = {f"state_dict/{key}" for key in content["state_dict"]}
    assert set(hashes) == tensors | (set(content) - {"state_dict"})
    key = next(iter(content["state_dict"]))
    content["state_dict"][key][0, 0] += 1e-6
    content["loops"]["fit_loop"]["epoch_progress"]["total"]["ready"] += 1
    content["stranger"] = 1
    del content["lr_schedulers"]
    assert set(damaged_parts(content) or []) == {
        f"state_dict/{key}", "loops", "stranger", "lr_schedulers",
    }  # fmt: skip


@pytest.mark.parametrize("weights_only", [True, False], ids=["weights only", "all"])
def test_every_kind_of_checkpoint_has_them(tmp_path: Path, weights_only: bool) -> None:
    fit(tmp_path).save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    assert damaged_parts(torch.load(tmp_path / "a.ckpt", weights_only=True)) == []
    load(tmp_path / "a.ckpt")


def test_a_checkpoint_without_hashes_loads(good: Path, tmp_path: Path) -> None:
    """One of version 0.1.0."""
    content = torch.load(good, weights_only=True)
    del content["lora_lightning"]["content"]
    torch.save(content, tmp_path / "old.ckpt")
    load(tmp_path / "old.ckpt")


# -- damage --------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return str(caught.value)


def test_edited_content_is_refused_by_name(good: Path, tmp_path: Path) -> None:
    content = torch.load(good, weights_only=True)
    content["state_dict"]["embed.adapters.default.lora_A"][1, 2] += 1e-6
    torch.save(content, tmp_path / "bad.ckpt")
    text = refusal(tmp_path / "bad.ckpt")
    assert "state_dict/embed.adapters.default.lora_A is not what was written" in text
    assert "if you edited it yourself, delete its ['lora_lightning']['content']" in text
    assert text.endswith("Nothing was loaded. No good one is beside it. (ckpt_path)")
    with pytest.raises(CheckpointError, match=r"embed\.adapters\.default\.lora_A is not what"):
        load_adapter(Net(), tmp_path / "bad.ckpt")


def test_negative_control_it_is_the_hash_that_notices(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(good, weights_only=True)
    content["state_dict"]["embed.adapters.default.lora_A"][1, 2] += 1e-6
    torch.save(content, tmp_path / "bad.ckpt")
    monkeypatch.setattr(checkpoint_files, "damaged_parts", lambda _: [])
    load(tmp_path / "bad.ckpt")


def test_the_newest_good_one_is_named(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    for age, name in enumerate(["newest", "damaged", "second", "oldest"]):
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(whole if name in ("second", "oldest") else whole[:-100])
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "last.ckpt").symlink_to("newest.ckpt")
    (tmp_path / "dangling.ckpt").symlink_to("nowhere.ckpt")
    text = refusal(tmp_path / "newest.ckpt")
    assert f"({len(whole) - 100:,} bytes) is truncated or damaged: File is not a zip file" in text
    assert f"The newest good one beside it is '{tmp_path / 'second.ckpt'}'." in text
    assert "second.ckpt" in refusal(tmp_path / "last.ckpt")
    assert newest_good(tmp_path, tmp_path / "second.ckpt") == tmp_path / "oldest.ckpt"


def flips(path: Path, count: int, io: Any) -> tuple[int, int]:
    """(refused, loaded as it was) of `count` files with one bit turned; a third one is an error."""
    whole = path.read_bytes()
    truth = torch.load(path, weights_only=True)
    target = path.with_name("flipped.ckpt")
    draw = random.Random(0)
    refused = harmless = 0
    for _ in range(count):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        target.write_bytes(content)
        try:
            loaded = io.load_checkpoint(target, weights_only=True)
        except CheckpointError:
            refused += 1
        else:
            assert same_content(loaded, truth)
            harmless += 1
    return refused, harmless


@pytest.mark.slow
def test_a_turned_bit_anywhere_is_noticed(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(good.read_bytes())
    refused, harmless = flips(path, 150, DurableCheckpointIO())
    assert refused > 75
    # Padding between the parts of the archive, and fields of its directory that nobody reads.
    assert harmless < 75


def test_negative_control_without_checks_turned_bits_are_loaded(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(good.read_bytes())

    class Plain(TorchCheckpointIO):
        def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().load_checkpoint(*args, **kwargs)
            except Exception as error:
                raise CheckpointError from error

    with pytest.raises(AssertionError):
        flips(path, 150, Plain())


def test_every_length_is_noticed(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    path = tmp_path / "short.ckpt"
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            DurableCheckpointIO().load_checkpoint(path, weights_only=True)
    with pytest.raises(FileNotFoundError):
        DurableCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def test_whole_files_that_torch_refuses_say_why(good: Path, tmp_path: Path) -> None:
    content = torch.load(good, weights_only=True)
    content["hyper_parameters"] = {"path": tmp_path}  # no plain type
    torch.save(with_hashes(content), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="beside tensors and plain values it holds pathlib"):
        load(tmp_path / "a.ckpt")
    io = DurableCheckpointIO()
    assert io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)["hyper_parameters"]


# -- writing -------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def disk_full(free: int) -> Iterator[None]:
    """The operating system lets no file grow beyond `free` bytes (EFBIG, for want of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 100 kB, on which four epochs' checkpoints have no room."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root; the tests with RLIMIT_FSIZE run everywhere")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


class SaveEveryStep(Callback):
    """Saves at every step, come what may, as a user's own callback could."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[str] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        try:
            trainer.save_checkpoint(self.path)
        except CheckpointError as error:
            self.errors.append(str(error))


def test_a_full_disk_is_told_and_the_old_file_stays(tmp_path: Path) -> None:
    straight = adapters(fit(tmp_path / "straight", max_epochs=2))
    path = tmp_path / "a.ckpt"
    trainer = fit(tmp_path)
    trainer.save_checkpoint(path)
    before = path.read_bytes()
    saver = SaveEveryStep(path)
    with disk_full(10_000):
        trainer = fit(tmp_path, saver, max_epochs=2)
    assert len(saver.errors) == 8
    assert f"'{path}' could not be written: File too large (it takes " in saver.errors[0]
    assert "B are free there" in saver.errors[0]
    assert (
        f"Nothing was overwritten or deleted. The newest good one there is '{path}'."
        in (saver.errors[0])
    )
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.ckpt"]  # no remains
    assert_same_state(adapters(trainer), straight)  # training was not disturbed
    trainer.save_checkpoint(path)
    assert path.read_bytes() != before


def test_negative_control_lightning_alone_loses_the_old_file(tmp_path: Path) -> None:
    """Where the temporary folder is on another disk, it copies in place."""
    trainer = fit(tmp_path)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    size = path.stat().st_size
    content = torch.load(path, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", cross_device)
        patch.setattr("shutil.copyfile", half_copy)
        with pytest.raises(OSError, match="No space left"):
            TorchCheckpointIO().save_checkpoint(content, path)
    assert path.stat().st_size < size
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load(path)


def cross_device(*_: Any, **__: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def half_copy(source: Any, target: Any, **_: Any) -> None:
    content = Path(source).read_bytes()
    Path(target).write_bytes(content[: len(content) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_during_fit(small_disk: Path) -> None:
    """ModelCheckpoint's own error; with room again, the run goes on as if nothing had been."""
    straight = adapters(fit(small_disk, max_epochs=4))

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(small_disk, filename="{epoch}", save_top_k=-1, save_last=True)

    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        fit(small_disk, saver(), max_epochs=4)
    good = newest_good(small_disk)
    assert good is not None
    assert f"The newest good one there is '{good}'" in str(caught.value)
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    trainer = fit(small_disk, ModelCheckpoint(small_disk), max_epochs=4, ckpt_path=good)
    assert_same_state(adapters(trainer), straight)


def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    trainer = fit(small_disk)
    trainer.save_checkpoint(small_disk / "a.ckpt")
    before = (small_disk / "a.ckpt").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("a.ckpt", "b.ckpt", "below/b.ckpt"):
        with pytest.raises(CheckpointError, match="could not be written: Read-only file system"):
            trainer.save_checkpoint(small_disk / name)
    assert (small_disk / "a.ckpt").read_bytes() == before


def test_a_folder_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fit(tmp_path)
    folder = tmp_path / "checkpoints"
    trainer.save_checkpoint(folder / "a.ckpt")
    shutil.rmtree(folder)
    trainer.save_checkpoint(folder / "b.ckpt")  # made anew, as Lightning does
    assert names(folder) == ["b.ckpt"]
    replace = os.replace

    def gone(source: Any, target: Any) -> None:
        shutil.rmtree(folder)
        replace(source, target)

    monkeypatch.setattr(os, "replace", gone)
    with pytest.raises(CheckpointError, match=r"No such file or directory .* No other one is"):
        trainer.save_checkpoint(folder / "c.ckpt")
    monkeypatch.undo()
    folder.write_text("a file in its place")
    with pytest.raises(CheckpointError, match="could not be written: File exists"):
        trainer.save_checkpoint(folder / "c.ckpt")
    (tmp_path / "taken.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="could not be written: Is a directory"):
        trainer.save_checkpoint(tmp_path / "taken.ckpt")


def killed_in(action: Callable[[], Any], step: int) -> bool:
    """Whether a copy of this process was killed at its `step`-th call of the system in `action`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's of threads: the copy only writes files
        child = os.fork()
    if child == 0:
        calls = itertools.count()

        def fatal(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == step:
                    os.kill(os.getpid(), 9)
                return function(*args, **kwargs)

            return call

        atomic_write.open = fatal(open)  # type: ignore[attr-defined]
        for name in ("fsync", "replace", "link", "unlink"):
            setattr(os, name, fatal(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 9


STEPS = ["open", "fsync", "os.replace", "fsync of the folder"]


@pytest.mark.parametrize("existing", [True, False], ids=["over", "fresh"])
@pytest.mark.parametrize("step", range(4), ids=STEPS)
def test_killed_at_every_step(step: int, existing: bool, good: Path, tmp_path: Path) -> None:
    """The file is the old one or the new one, as a whole; what is left over goes with the next."""
    path = tmp_path / "hpc_ckpt_1.ckpt"
    old, new = b"old" * 1000, good.read_bytes()
    if existing:
        path.write_bytes(old)
    assert killed_in(lambda: write_atomically({path: new}), step)
    found = [p for p in tmp_path.glob("*") if "ckpt_" in p.name]  # what Lightning looks for
    assert found == ([path] if existing or step == 3 else [])
    if found:
        assert path.read_bytes() == (new if step == 3 else old)
    write_atomically({path: new})
    assert names(tmp_path) == [path.name]


def test_negative_control_written_in_place_half_a_file_is_left(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    old, new = b"old" * 1000, good.read_bytes()
    path.write_bytes(old)

    def in_place() -> None:
        with open(path, "wb") as file:
            file.write(new[:1000])
            file.flush()
            os.fsync(file.fileno())

    assert killed_in(in_place, 0)
    assert path.read_bytes() not in (old, new)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        DurableCheckpointIO().load_checkpoint(path, weights_only=True)


def saving_fails(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """On each of two processes: the errors of a run on a full disk, adapters with and without."""
    states = []
    for place, size in ((folder / "straight", 10**9), (folder / "full", 10_000)):
        saver = SaveEveryStep(place / "a.ckpt")
        with disk_full(size):
            trainer = fit(place, saver, max_epochs=2, devices=2, strategy="ddp")
        states.append(adapters(trainer))
    return saver.errors, states


@pytest.mark.slow
def test_all_processes_learn_that_saving_failed(tmp_path: Path) -> None:
    """Rank 0 writes; the others must not wait for it."""
    results = on_processes(2, saving_fails, tmp_path)
    for rank, (errors, (straight, full)) in enumerate(results):
        assert len(errors) == 4
        assert ("by another process, whose error says why" in errors[0]) == (rank == 1)
        assert_same_state(straight, full)


# -- Lightning's ways of saving --------------------------------------------------------------------


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files and folders in the order in which they are flushed."""
    found: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        found.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files: Linux only")
@pytest.mark.filterwarnings("ignore:.*was called without a model")  # with OnExceptionCheckpoint
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()]], ids=["plain", "async"])
def test_everything_that_saves_is_flushed(
    plugins: list[Any], tmp_path: Path, flushed: list[str]
) -> None:
    class Fails(Callback):
        def on_train_end(self, *_: Any) -> None:
            raise KeyError

    saver = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(KeyError):
        fit(tmp_path, saver, OnExceptionCheckpoint(tmp_path, "failed"), Fails(), plugins=plugins)
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "failed.ckpt", "last.ckpt"]
    assert len(flushed) == 6  # each of the three, and the folder
    assert flushed[1::2] == [tmp_path.name] * 3
    for path in tmp_path.iterdir():
        assert damaged_parts(torch.load(path, weights_only=True)) == []


class Watch(Callback):
    """There is always a whole checkpoint once there has been one; looks at every removal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.removals = 0

    def look(self, left_out: Path) -> None:
        self.removals += 1
        others = [p for p in self.folder.glob("*.ckpt") if p.resolve() != left_out.resolve()]
        assert any(damaged_parts(torch.load(p, weights_only=True)) == [] for p in others)


@pytest.mark.slow
@pytest.mark.parametrize("link", [True, "link"], ids=["copy", "link"])
@pytest.mark.parametrize("plugins", [False, True], ids=["plain", "async"])
def test_old_files_go_after_new_ones_are_there(
    plugins: bool, link: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(tmp_path)
    remove = TorchCheckpointIO.remove_checkpoint
    errors = []

    def looked_at(self: Any, path: Any) -> None:
        try:
            watch.look(Path(path))
            remove(self, path)
            if link == "link" and (tmp_path / "last.ckpt").is_symlink():
                assert (tmp_path / "last.ckpt").exists()  # never dangling
        except BaseException as error:
            errors.append(error)
            raise

    slow = write_atomically

    def slowly(files: Any) -> None:
        time.sleep(0.03)  # so that a background writer is behind
        slow(files)

    monkeypatch.setattr(TorchCheckpointIO, "remove_checkpoint", looked_at)
    monkeypatch.setattr(checkpoint_files, "write_atomically", slowly)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, save_last=link)
    fit(tmp_path, saver, plugins=[AsyncCheckpointIO()] if plugins else [], max_epochs=2)
    assert not errors
    assert watch.removals == 7
    assert names(tmp_path) == ["epoch=1-step=8.ckpt", "last.ckpt"]
    load(tmp_path / "last.ckpt")


def test_negative_control_a_background_writer_alone_has_a_moment_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DurableCheckpointIO, "in_order", lambda self, action: action())
    with pytest.raises(Exception):  # noqa: B017
        test_old_files_go_after_new_ones_are_there(True, True, tmp_path, monkeypatch)


def test_nothing_is_deleted_after_a_background_save_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1)
    count = itertools.count()

    def full(files: Any) -> None:
        if next(count) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(files)

    monkeypatch.setattr(checkpoint_files, "write_atomically", full)
    with pytest.raises(CheckpointError, match=r"No space left on device .*step=2\.ckpt'"):
        fit(tmp_path, saver, plugins=[AsyncCheckpointIO()])
    assert names(tmp_path) == ["epoch=0-step=2.ckpt"]
    load(tmp_path / "epoch=0-step=2.ckpt")


def test_a_link_is_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "last.ckpt"
    link_atomically(tmp_path / "a", link)
    replace = os.replace

    def checked(source: Any, target: Any) -> None:
        assert link.read_text() == "a"
        replace(source, target)
        assert link.read_text() == "b"

    monkeypatch.setattr(os, "replace", checked)
    link_atomically(tmp_path / "b", link)
    assert os.readlink(link) == "b"
    monkeypatch.undo()
    monkeypatch.setattr(os, "symlink", cross_device)  # where links cannot be made: a copy
    link_atomically(tmp_path / "a", link)
    assert link.read_text() == "a"
    assert names(tmp_path) == ["a", "b", "last.ckpt"]


class OwnWriter(CheckpointIO):
    """One that a user brings: a folder of its own format."""

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.saved[str(path)] = checkpoint

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> Any:
        return self.saved[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        del self.saved[str(path)]


def test_the_users_own_writer_stays(tmp_path: Path) -> None:
    writer = OwnWriter()
    with pytest.warns(UserWarning, match="Checkpoints are written by OwnWriter, in its own way"):
        trainer = fit(tmp_path, plugins=[writer])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert list(writer.saved) == [str(tmp_path / "a.ckpt")]
    assert names(tmp_path) == []


def test_other_file_systems(tmp_path: Path) -> None:
    """Through fsspec as before, with the hashes."""
    trainer = fit(tmp_path)
    trainer.save_checkpoint("memory://there/a.ckpt")
    io = DurableCheckpointIO()
    content = io.load_checkpoint("memory://there/a.ckpt", weights_only=True)
    assert damaged_parts(content) == []
    trainer.save_checkpoint(f"file://{tmp_path}/b.ckpt")
    assert damaged_parts(io.load_checkpoint(f"file://{tmp_path}/b.ckpt", weights_only=True)) == []
    content["epoch"] = 5
    TorchCheckpointIO().save_checkpoint(content, "memory://there/c.ckpt")
    with pytest.raises(CheckpointError, match="epoch is not what was written"):
        io.load_checkpoint("memory://there/c.ckpt", weights_only=True)
    with pytest.raises(TypeError, match="storage_options"):
        trainer.save_checkpoint(tmp_path / "c.ckpt", storage_options={})


# -- PEFT folders ----------------------------------------------------------------------------------


def adapted(lora_alpha: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapter(model, LoraConfig(r=2, lora_alpha=lora_alpha, target_modules=["0"]))
    return model


@pytest.mark.parametrize("alpha", [8, 4], ids=["same options", "other options"])
def test_a_peft_folder_killed_at_every_step(alpha: int, tmp_path: Path) -> None:
    """It holds the old adapter or the new one, or is incomplete and refused; never a mixture."""
    old, new = adapted(8), adapted(alpha)
    with torch.no_grad():
        new[0].adapters["default"].lora_B.fill_(1)
    seen = set()
    for step in range(40):
        folder = tmp_path / str(step)
        save_adapter(old, folder)
        killed = killed_in(lambda folder=folder: save_adapter(new, folder), step)
        found = nn.Sequential(nn.Linear(4, 4))
        try:
            load_adapter(found, folder)
        except CheckpointError as error:
            seen.add("incomplete" if "adapter_" in str(error) else str(error))
        else:
            config = found[0].adapters["default"].config
            filled = bool(found[0].adapters["default"].lora_B.any())
            assert (config.lora_alpha, filled) in ((8, False), (alpha, True))
            seen.add("new" if filled else "old")
        save_adapter(new, folder)
        assert len(names(folder)) == 2
        if not killed:
            break
    assert seen == {"old", "new"} | ({"incomplete"} if alpha == 4 else set())
