"""The page of a run: what it says is so, it needs nothing else, and text in it is only text."""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import shutil
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lora_lightning
from lora_lightning import LoraCallback
from lora_lightning.callbacks.comparison import Comparison
from lora_lightning.callbacks.comparison_file import read_comparison, write_comparison
from lora_lightning.errors import CheckpointError, ConfigError, RecordError
from lora_lightning.runs.build import trained_module
from lora_lightning.runs.run import find_run
from lora_lightning.verbs.report import html, style
from lora_lightning.verbs.report.result import Report
from lora_lightning.verbs.report.updates import read_updates
from tests.helpers.browser import opened
from tests.helpers.command import run_command
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.paths import ROOT, child_environment
from tests.helpers.tiny_lm import tiny_llama
from tests.helpers.trained_runs import LANGUAGE_MODEL, chat_rows, fit

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>$x$'


@pytest.fixture(scope="session")
def sampled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM's run with samples, speed and memory, three validations."""
    folder = tmp_path_factory.mktemp("sampled")
    tiny_llama(folder / "base", "chatml")
    lines = [json.dumps(row) for row in chat_rows()]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    trainer = LANGUAGE_MODEL["trainer"]
    more = [
        {"class_path": "lora_lightning.TextSamples", "init_args": {"max_new_tokens": 4}},
        {"class_path": "lora_lightning.TrainingProgress"},
    ]
    changed = {"max_epochs": 3, "log_every_n_steps": 1, "callbacks": [*trainer["callbacks"], *more]}
    return fit(folder, {**LANGUAGE_MODEL, "trainer": {**trainer, **changed}})


@pytest.fixture(scope="session")
def made(sampled_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(sampled_run.parents[1])
        out = tmp_path_factory.mktemp("page") / "page.html"
        return lora_lightning.report(sampled_run, out=str(out))


class Structure(HTMLParser):
    """Tags, attributes and texts of a page, and whether tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for place, text in self.texts if place == tag]


def check_stands_alone(page: str) -> Structure:
    """No script, no style or picture from elsewhere, no handler; ids are unique."""
    found = Structure(page)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    ids = []
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
        ids += [attributes["id"]] if "id" in attributes else []
    assert len(ids) == len({*ids})
    assert "url(http" not in page
    assert "@import" not in page
    return found


def test_the_page_stands_alone_and_says_what_is_so(made: Report, sampled_run: Path) -> None:
    page = check_stands_alone(made.html)
    assert made.path.read_text() == made.html
    headings = page.of("h2")
    lines = (sampled_run / "logs/version_0/metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert headings[0] == f"val_loss fell from {losses[0]:.3g} to {losses[-1]:.3g} in 12 steps"
    comparison = read_comparison(sampled_run)
    assert comparison is not None
    assert comparison.tuned["val_loss"] == pytest.approx(losses[-1])
    assert comparison.verdict.replace("+-", "±") in [h[:1].lower() + h[1:] for h in headings]
    assert f"{comparison.base['val_loss']:.4g}" in page.of("td")
    assert [h for h in headings if re.fullmatch(r"r = 4 is used to [1-4]; the update is .*", h)]
    assert [h for h in headings if re.search(r"tokens a second, .* at most", h)]
    samples = (sampled_run / "logs/version_0/samples.jsonl").read_text().splitlines()
    last = json.loads(samples[-1])
    assert last["prompt"] in page.of("pre")
    assert made.findings[0] == headings[0]
    assert str(made) == "\n".join(made.findings)


def test_the_pictures_are_files_too(made: Report) -> None:
    names = {path.stem for path in made.figures_path.iterdir()}
    expected = {
        "loss", "accuracy", "perplexity", "learning_rate", "comparison", "throughput", "memory",
        "update_size", "rank_use", "spectra",
    }  # fmt: skip
    assert names == expected == made.figures.keys()
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in made.figures_path.iterdir())
    assert made.html.count("<svg") == len(expected)
    for axes in (figure.axes[0] for figure in made.figures.values()):
        assert axes.get_xlabel()
    assert made.figures["loss"].axes[0].get_ylabel() == "loss"


def test_colours_change_with_the_theme(made: Report) -> None:
    body = made.html.partition("</style>")[2]
    assert not [colour for colour in style._DARK if colour in body]
    assert "prefers-color-scheme:dark" in made.html
    for number in re.findall(r"var\(--c(\d+)\)", body):
        assert made.html.count(f"--c{number}:") == 2


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(
    made: Report, sampled_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sampled_run.parents[1])
    again = lora_lightning.report(sampled_run, out=str(tmp_path / "page.html"))
    assert again.html == made.html
    for png in made.figures_path.iterdir():
        assert (again.figures_path / png.name).read_bytes() == png.read_bytes()


def test_a_notebook_shows_it_apart(made: Report) -> None:
    shown = made._repr_html_()
    frame = [attributes for tag, attributes in Structure(shown).tags if tag == "iframe"]
    assert frame[0]["srcdoc"] == made.html
    assert frame[0]["sandbox"] is None  # there, without any right


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(made: Report, width: int, dark: bool, tmp_path: Path) -> None:
    found = opened(made.html, width, tmp_path, dark)
    assert found["scroll"] <= width
    assert found["wide"] == 0
    assert found["figures"] == len(made.figures)
    assert found["smallest"] >= 9  # pixels
    light = "rgb(255, 255, 255)"
    assert (found["paper"] == light) != dark
    assert (tmp_path / f"{width}.png").stat().st_size > 20_000


@pytest.mark.slow
def test_the_browsers_test_can_fail(made: Report, tmp_path: Path) -> None:
    broken = made.html.replace("<main>", '<main><div style="width:900px">wide</div>')
    found = opened(broken, 400, tmp_path)
    assert found["scroll"] > 400
    assert found["wide"] > 0


# -- what was learned ----------------------------------------------------------------------------


def test_sizes_are_those_of_the_dense_update(
    sampled_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sampled_run.parents[1])
    run = find_run(sampled_run)
    found = {update.path: update for update in read_updates(run).weights}
    module = trained_module(run)
    path = "network.model.layers.1.self_attn.v_proj"
    layer = module.get_submodule(path)
    adapter = layer.adapters["default"]
    dense = (8 / 4) * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    weight = layer.weight.detach().double()
    assert found[path].spectrum.relative == pytest.approx(float(dense.norm() / weight.norm()))
    torch.testing.assert_close(found[path].spectrum.values, torch.linalg.svdvals(dense)[:4])
    assert (found[path].layer, found[path].target) == (1, "network.model.layers.*.self_attn.v_proj")


@pytest.mark.slow
def test_without_the_base_sizes_are_absolute(
    sampled_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sampled_run.parents[1])
    run = find_run(sampled_run)
    whole, alone = read_updates(run), read_updates(run, weights=False)
    assert [u.path for u in alone.weights] == [u.path for u in whole.weights]
    for one, other in zip(alone.weights, whole.weights, strict=True):
        assert one.spectrum.norm == pytest.approx(other.spectrum.norm, rel=1e-6)
        assert one.spectrum.used_rank == other.spectrum.used_rank
        assert one.spectrum.relative is None
    page = lora_lightning.report(sampled_run, out=str(tmp_path / "a.html"), weights=False).html
    assert "Sizes are absolute" in page
    # The base is gone: the page says so, in the error's own words.
    base = sampled_run.parents[1] / "base"
    base.rename(base.with_name("elsewhere"))
    try:
        made = lora_lightning.report(sampled_run, out=str(tmp_path / "b.html"))
    finally:
        base.with_name("elsewhere").rename(base)
    assert [line for line in made.findings if line.startswith("the base was not loaded: Model")]
    assert "Sizes are absolute" in made.html


def test_an_own_module_and_the_command(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = own_run.parents[1]
    monkeypatch.syspath_prepend(str(folder))
    output = run_command(folder, monkeypatch, capfd, "report", "runs/own")
    assert "report: runs/own/report.html" in output
    page = check_stands_alone((own_run / "report.html").read_text())
    assert "trained in full (modules_to_save)" in page.of("th")
    assert "head" in page.of("th")
    refused = run_command(folder, monkeypatch, capfd, "report", "runs/own", fails=1)
    assert "there already" in refused
    assert "--force" in refused
    run_command(folder, monkeypatch, capfd, "report", "runs/own", "--force")
    (own_run / "report.html").unlink()
    refused = run_command(folder, monkeypatch, capfd, "report", "runs/own", fails=1)
    assert "where the pictures go" in refused
    unknown = run_command(folder, monkeypatch, capfd, "report", "runs/own", "--forse", fails=2)
    assert "Did you mean '--force'" in unknown
    shutil.rmtree(own_run / "report_figures")


@pytest.mark.slow
def test_several_runs_and_what_differs(
    sampled_run: Path,
    own_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "second"
    shutil.copytree(sampled_run, other)
    config = (other / "config.yaml").read_text().replace("lora_alpha: 8.0", "lora_alpha: 16.0")
    (other / "config.yaml").write_text(config)
    out = str(tmp_path / "both.html")
    folder = sampled_run.parents[1]
    places = ["runs/lm", str(other)]
    output = run_command(folder, monkeypatch, capfd, "report", *places, "--out", out)
    assert "lm: val_loss fell" in output
    assert "second: val_loss fell" in output
    page = check_stands_alone(Path(out).read_text())
    assert "1 option differs" in page.of("h2")
    assert "lora.lora_alpha" in page.of("th")
    assert "16" in page.of("td")
    assert [f for f in page.of("h2") if f.startswith("All runs have the same val_loss")]
    assert (tmp_path / "both_figures/update_size_2.png").is_file()
    # Of unlike kinds.
    mixed = lora_lightning.report(sampled_run, own_run, out=str(tmp_path / "mixed.html"))
    check_stands_alone(mixed.html)


# -- runs of other kinds ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trainer_of_ones_own(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="lightning_logs")
    options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 3}
    trainer = make_trainer(tmp_path, LoraCallback(r=2), enable_checkpointing=True, **options)
    trainer.fit(Net(), datamodule=Data())
    version = tmp_path / "lightning_logs/version_0"
    for place in (tmp_path, version, next(version.glob("checkpoints/*.ckpt"))):
        made = lora_lightning.report(place, module=Net, out=str(tmp_path / "a.html"), force=True)
        assert "val_loss" in made.findings[0]
        assert re.match(r"r = 2 is used to \d", made.findings[1])
    unnamed = lora_lightning.report(version)
    assert "does not say which module" in str(unnamed)
    assert unnamed.path == version / "report.html"
    # Without any checkpoint: as far as its logs go.
    shutil.rmtree(version / "checkpoints")
    bare = lora_lightning.report(version, force=True)
    assert bare.figures.keys() == {"loss"}
    assert "The run has no checkpoint" in bare.html


def test_a_run_that_went_on_is_one_curve(own_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(own_run / "checkpoints", run / "checkpoints")
    logs = {
        "version_0": "step,val_loss\n9,3\n19,2\n29,9\n39,9\n",
        "version_1": "step,val_loss\n29,1.5\n39,1\n",
        "version_2": "step,val_loss\n0,0.5\n",  # of `validate`
        "version_10": "step,val_loss,nothing\n49,0.7,\n59,nan,\n",
    }
    for name, text in logs.items():
        (run / "logs" / name).mkdir(parents=True)
        (run / "logs" / name / "metrics.csv").write_text(text)
    (run / "logs/version_2/config.yaml").write_text("verbose: true\n")
    made = lora_lightning.report(run, weights=False)
    (line,) = made.figures["loss"].axes[0].lines
    assert line.get_xydata().tolist() == [[9, 3], [19, 2], [29, 1.5], [39, 1], [49, 0.7]]
    assert "val_loss fell from 3 to 0.7 in 50 steps, and was not finite" in made.html


@pytest.mark.slow
def test_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--trainer.limit_train_batches=4 --trainer.enable_progress_bar=false --trainer.limit_val_batches=4 --trainer.log_every_n_steps=1"
    arguments = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *options.split()]
    monkeypatch.setattr(sys, "argv", ["lora-lightning", *arguments])
    lora_lightning.cli.main.main()
    made = lora_lightning.report("runs/quickstart")
    page = check_stands_alone(made.html)
    assert "query" in page.texts.__str__()
    assert "val_accuracy" in page.of("dt")


# -- text from files is only text ----------------------------------------------------------------


def evil_run(own_run: Path, folder: Path) -> Path:
    run = folder / EVIL.replace("/", "_")
    shutil.copytree(own_run / "checkpoints", run / "checkpoints")
    shutil.copy(own_run / "config.yaml", run)
    logs = run / "logs/version_0"
    logs.mkdir(parents=True)
    name = EVIL.replace('"', '""')
    (logs / "metrics.csv").write_text(f'step,"{name}_loss","lr-{name}"\n1,2,3\n2,1,3\n')
    row = {"step": 1, "prompt": EVIL, "expected": "\x1b[2J\u202e", "base": EVIL, "tuned": EVIL}
    (logs / "samples.jsonl").write_text(json.dumps(row))
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    (run / "checkpoints").joinpath("best.ckpt").unlink()
    torch.save(checkpoint, run / "checkpoints/last.ckpt")
    write_comparison(Comparison({EVIL: 1.0}, {EVIL: 0.5}, EVIL, "min", title=EVIL), run)
    with (run / "config.yaml").open("a") as config:
        config.write(f"{json.dumps(EVIL)}: {json.dumps(EVIL)}\n")
    return run


def test_markup_in_a_run_is_text(own_run: Path, tmp_path: Path) -> None:
    made = lora_lightning.report(evil_run(own_run, tmp_path), out=str(tmp_path / "a.html"))
    page = check_stands_alone(made.html)
    assert page.of("pre").count(EVIL) == 3
    assert "\\x1b[2J\\u202e" in page.of("pre")
    assert EVIL in page.of("dt")
    assert [label for label in page.of("text") if EVIL[:30] in label], "in a picture"
    assert [a["aria-label"] for t, a in page.tags if t == "svg" and EVIL in (a["aria-label"] or "")]


def test_the_search_for_markup_can_fail(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "text", str)
    made = lora_lightning.report(evil_run(own_run, tmp_path), out=str(tmp_path / "a.html"))
    with pytest.raises(AssertionError):
        check_stands_alone(made.html)


# -- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_gets_the_pictures(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for SummaryWriter; test_the_real_tensorboard has the package itself."""
    run = tmp_path / "run"
    shutil.copytree(own_run, run)
    events = run / "logs/version_0/events.out.tfevents.1"
    events.touch()
    written: list[tuple[str, str, tuple[int, ...], int]] = []

    class Writer:
        def __init__(self, folder: str, filename_suffix: str) -> None:
            self.folder = folder

        def add_image(self, name: str, image: Any, step: int, dataformats: str) -> None:
            assert dataformats == "HWC"
            written.append((self.folder, name, image.shape, step))

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *_: object) -> None: ...

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    made = lora_lightning.report(run, weights=False, out=str(tmp_path / "a.html"))
    assert {name for _, name, _, _ in written} == {f"report/{name}" for name in made.figures}
    assert {(folder, step) for folder, _, _, step in written} == {(str(events.parent), 4)}
    assert all(shape[2] == 3 and min(shape[:2]) > 100 for _, _, shape, _ in written)


@pytest.mark.slow
def test_the_real_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 3}
    trainer = make_trainer(tmp_path, LoraCallback(r=2), enable_checkpointing=True, **options)
    trainer.fit(Net(), datamodule=Data())
    made = lora_lightning.report(tmp_path, module=Net)
    assert "val_loss" in made.findings[0]  # read from the event file
    events = EventAccumulator(str(logger.log_dir), size_guidance={"images": 0})
    events.Reload()
    assert {*events.Tags()["images"]} == {f"report/{name}" for name in made.figures}


# -- what goes wrong -----------------------------------------------------------------------------


def test_bad_requests(own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "a.html")
    with pytest.raises(CheckpointError, match=r"no run .*Did you mean"):
        lora_lightning.report(own_run.with_name("onw"), out=out)
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        lora_lightning.report(tmp_path, out=out)
    with pytest.raises(ConfigError, match=r"name it FILE\.html"):
        lora_lightning.report(own_run, out=str(tmp_path / "a.pdf"))
    with pytest.raises(ConfigError, match=r"checkpoint of one run, and there are 2"):
        lora_lightning.report(own_run, own_run, ckpt="a.ckpt", out=out)
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="no adapter"):
        lora_lightning.report(tmp_path / "plain.ckpt", out=out)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "matplotlib" else real(name, *a),
    )
    with pytest.raises(ConfigError, match=r'pip install "lora_lightning\[report\]"'):
        lora_lightning.report(own_run, out=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain.ckpt"]


def test_damaged_files_of_a_run(own_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(own_run, run)
    (run / "logs/version_0/samples.jsonl").write_text('{"step": 1}\n{"prompt"')
    with pytest.raises(RecordError, match=r"samples\.jsonl', line 2, is no sample"):
        lora_lightning.report(run, weights=False)
    (run / "logs/version_0/samples.jsonl").unlink()
    (run / "comparison.json").write_text('{"base": {}}')
    with pytest.raises(CheckpointError, match=r"comparison\.json' is not what a fit writes"):
        lora_lightning.report(run, weights=False)
    (run / "comparison.json").unlink()
    (run / "checkpoints/best.ckpt").write_bytes(b"PK no more")
    (run / "checkpoints/last.ckpt").write_bytes(b"PK no more")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        lora_lightning.report(run, weights=False)
    shutil.rmtree(run / "checkpoints")
    (run / "logs/version_0/metrics.csv").write_bytes(b"step,a\n\xff\xfe,1\n")
    with pytest.raises(RecordError, match=r"metrics\.csv' cannot be read"):
        lora_lightning.report(run, weights=False)
    assert not (run / "report.html").exists()


def test_values_that_are_close_can_be_read() -> None:
    """What stands beside base and tuned is inside the picture, and over nothing else."""
    from lora_lightning.verbs.report.training_figures import comparison_figure

    pairs = [(6.319, 6.107), (6.209, 6.196), (6.2, 6.2), (6.1, 6.32)]
    found = {
        f"run {n}": Comparison({"val_loss": base}, {"val_loss": tuned}, "val_loss", "min")
        for n, (base, tuned) in enumerate(pairs)
    }
    for runs in (found, {"run 1": found["run 1"]}):
        figure = comparison_figure(runs)
        assert figure is not None
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        assert len(boxes) == 2 * len(runs)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    unbounded = Comparison({"val_loss": float("inf")}, {"val_loss": 6.0}, "val_loss", "min")
    assert comparison_figure({"run": unbounded}) is not None


def test_a_comparison_comes_back(tmp_path: Path) -> None:
    asked = Comparison({"a": 1.0, "b": float("inf")}, {"a": 0.5}, "a", "min", 0.1, "t", ["head"])
    write_comparison(asked, tmp_path)
    assert read_comparison(tmp_path) == asked
    assert json.loads((tmp_path / "comparison.json").read_text())["verdict"] == asked.verdict


@pytest.mark.slow
def test_as_a_process_and_on_a_full_disk(own_run: Path) -> None:
    folder = own_run.parents[1]
    code = "from lora_lightning.cli.main import main; main()"
    command = [sys.executable, "-c", code, "report", "runs/own", "--out", "full/page.html"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))

    def run(**options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=folder,
            env=child_environment(),
            text=True,
            capture_output=True,
            check=False,
            **options,
        )

    full = run(preexec_fn=limit)
    assert full.returncode == 1, full.stderr
    assert "cannot be written: File too large. Nothing was left there. (out)" in full.stderr
    assert "Traceback" not in full.stderr
    assert not [*(folder / "full").iterdir()]
    done = run()
    assert done.returncode == 0, done.stderr
    assert (folder / "full/page.html").is_file()
