"""Help, and errors about options, without torch: from the snapshot, in the words of the parsers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import lora_lightning
import lora_lightning.cli.options
from lora_lightning.cli import verbs
from lora_lightning.cli.help import help_of_command, help_of_verb
from lora_lightning.cli.options import SNAPSHOT, Known, from_json, installed, snapshot, to_json
from lora_lightning.cli.quick_check import check_arguments
from lora_lightning.cli.snapshot import asked_parsers
from lora_lightning.cli.verbs import parser_of
from tests.helpers.command import run_command
from tests.helpers.paths import ROOT, child_environment

RENEW = "python -m lora_lightning.cli.snapshot"


@pytest.fixture(scope="module")
def known() -> Known:
    found = snapshot()
    assert found is not None, f"it was made with other versions; renew it: {RENEW}"
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "modules.py").write_text((ROOT / "tests/helpers/lightning_modules.py").read_text())
    config = {"model": {"class_path": "modules.Net"}, "data": {"class_path": "modules.Data"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def cli(folder: Path, monkeypatch: Any, capfd: Any) -> Any:
    return partial(run_command, folder, monkeypatch, capfd)


def without_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_lightning.cli.options, "snapshot", lambda: None)


# -- the snapshot ----------------------------------------------------------------------------------


def test_it_is_what_the_parsers_say(known: Known) -> None:
    made_with = json.loads(SNAPSHOT.read_text())["made_with"]
    if made_with != installed():
        pytest.skip(f"made with {made_with}, here is {installed()}: the command asks the parsers")
    assert SNAPSHOT.read_text() == to_json(asked_parsers()), f"options changed; renew it: {RENEW}"
    assert from_json(to_json(known)) == known


def test_an_option_that_changes_is_noticed(known: Known) -> None:
    """The negative control of the comparison."""
    first, *others = known.shared
    changed = replace(known, shared=(replace(first, default="another"), *others))
    assert to_json(changed) != to_json(known)


def test_with_other_versions_the_parsers_are_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = json.loads(SNAPSHOT.read_text())
    content["made_with"]["lightning"] = "1.0"
    (tmp_path / "old.json").write_text(json.dumps(content))
    for path in (tmp_path / "old.json", tmp_path / "none.json"):
        monkeypatch.setattr(lora_lightning.cli.options, "SNAPSHOT", path)
        assert snapshot.__wrapped__() is None


def test_help_is_the_same_either_way(cli: Any, monkeypatch: Any, known: Known) -> None:
    kept = [cli("--help"), cli("fit", "--help"), cli("validate", "runs/a", "-h")]
    without_snapshot(monkeypatch)
    assert [cli("--help"), cli("fit", "--help"), cli("validate", "runs/a", "-h")] == kept


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_help_is_legible(known: Known, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    texts = {name: help_of_verb(name, known) for name in ("configs", *known.verbs)}
    texts["--help"] = help_of_command(known)
    links = ("https://",)
    for name, text in texts.items():
        wide = [line for line in text.splitlines() if len(line) > width]
        assert not [line for line in wide if not any(link in line for link in links)], name
    assert len(texts["--help"].splitlines()) < 50
    for verb in known.verbs:
        assert f"\n  {verb} " in texts["--help"]


def test_help_of_fit_names_every_option(known: Known) -> None:
    text = help_of_verb("fit", known)
    for option in known.options_of("fit"):
        if option.name not in ("model", "data"):
            assert f"--{option.name} " in text, option.name
    words = " ".join(text.split())
    for section, classes in (("model", known.models), ("data", known.data)):
        for path, described in classes.items():
            assert f"--{section} {path}" in text
            assert ", ".join(option.name for option in described.options) in words
    assert (
        text.index("--lora.r ") < text.index("--model lora_") < text.index("--trainer.max_epochs")
    )


def test_without_torch(folder: Path) -> None:
    """As processes that may not import it; what they take is measured by hand."""
    (folder / "no_torch.py").write_text(
        "import sys\n"
        "for name in ('torch', 'lightning', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from lora_lightning.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )

    def process(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "no_torch.py", *arguments],
            cwd=folder,
            env=child_environment(COLUMNS="80"),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert process("--help")[0] == process("fit", "--help")[0] == process("configs")[0] == 0
    code, text = process("fit", "--config", "my.yaml", "--lora.rnak", "4")
    assert (code, text.splitlines()[0]) == (
        2,
        "lora-lightning: error: unrecognized arguments: --lora.rnak 4. Did you mean '--lora.r'?",
    )
    code, text = process("fit", "--config", "my.yaml", "--lora.r", "4")
    assert code == 1
    assert "import of torch halted" in text  # the control: what is right goes on to import it


# -- mistakes, from the snapshot and from the parsers ----------------------------------------------

TASK = ["fit", "--config", "sft"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "option": (
        ["--lora.lora_alhpa", "4"],
        "--lora.lora_alhpa 4. Did you mean '--lora.lora_alpha'?",
    ),
    "several": (["--lora.a", "b c", "--x=1"], "unrecognized arguments: --lora.a b c --x=1."),
    "integer": (["--lora.r", "many"], "lora.r takes an integer, not 'many'. (lora.r)"),
    "number": (["--lora.lr=fast"], "lora.lr takes a number, not 'fast'."),
    "truth": (["--lora.use_dora", "maybe"], "lora.use_dora takes true or false, not 'maybe'."),
    "choice": (
        ["--lora.nonfinite", "skp"],
        "takes one of stop, skip, ignore, not 'skp'. Did you mean 'skip'? (lora.nonfinite)",
    ),
    "several kinds": (
        ["--trainer.max_epochs", "x"],
        "trainer.max_epochs takes an integer or null, not 'x'.",
    ),
    "kinds and choices": (
        ["--trainer.deterministic", "x"],
        "trainer.deterministic takes true or false or one of warn or null, not 'x'.",
    ),
    "no value": (["--lora.r"], "argument --lora.r: expected one argument"),
}
OF_CLASSES: dict[str, tuple[list[str], str]] = {
    "option of a task": (
        ["--model.lerning_rate", "1"],
        "lora_lightning.CausalLM does not accept option 'lerning_rate' (model). Did you mean "
        "'learning_rate'?\nAll options: lora-lightning fit --model.help lora_lightning.CausalLM\n",
    ),
    "value of a task": (["--model.learning_rate", "x"], "model.learning_rate takes a number, not"),
    "option of a data module": (["--data.trian", "a.jsonl"], "(data). Did you mean 'train'?"),
    "beside one": (
        ["--model.model", "a --lora.s b", "--lora.s", "1"],
        "unrecognized arguments: --lora.s 1.",
    ),
}


def said(cli: Any, mistake: str) -> str:
    given, wanted = {**MISTAKES, **OF_CLASSES}[mistake]
    begin = ["fit", "--config", "my.yaml"] if mistake in MISTAKES else TASK
    text = str(cli(*begin, *given, fails=2))
    assert wanted in text
    assert len(text.splitlines()) == 2
    return text


@pytest.mark.parametrize("mistake", [*MISTAKES, *OF_CLASSES])
def test_mistakes(cli: Any, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    monkeypatch.setattr("lora_lightning.cli.main._run", _must_not_run)
    said(cli, mistake)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [*MISTAKES, *OF_CLASSES])
def test_the_parsers_use_the_same_words(
    cli: Any, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    quick = said(cli, mistake)
    without_snapshot(monkeypatch)
    assert said(cli, mistake) == quick


def _must_not_run(*_: Any) -> None:
    raise AssertionError("the snapshot was not enough")


NOT_JUDGED = [
    ["--model", "modules.Net", "--model.width", "wide"],
    ["--model.init_args.width", "wide"],
    ["--data.anything", "1"],
    ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "x"],
    ["--trainer.logger.save_dir", "x"],
    ["--lora", "lora.yaml"],
    ["--lora.rank_pattern.q", "4"],
    ["--optimizer", "SGD", "--optimizer.lr", "0.1"],
    ["--lora.target_modules+", "a"],
    ["--lora.r", "0x10"],
    ["--lora.lr", "1e-3"],
    ["--lora.use_dora", "True"],
    ["--trainer.max_epochs", "null"],
    ["--print_config"],
]


@pytest.mark.parametrize("arguments", NOT_JUDGED, ids=lambda words: " ".join(words))
def test_what_the_snapshot_does_not_know_is_left_to_the_parsers(
    known: Known, arguments: list[str]
) -> None:
    config = {"model": {"class_path": "modules.Net"}, "data": {"class_path": "modules.Data"}}
    check_arguments("fit", ["--config", "my.yaml", *arguments], [config], known)
    check_arguments("fit", ["runs/a", *arguments], [], known)


def test_a_verb_with_a_run_alone_or_nothing(known: Known, cli: Any) -> None:
    for verb in sorted({*known.verbs} - {"export", "merge"}):  # which ask for more
        check_arguments(verb, ["runs/a"], [], known)
    assert "error: model and data missing: " in cli("fit", fails=2)
    assert "required: run" in cli("generate", fails=2)


def test_no_model_and_data(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = cli("fit", "--lora.r", "3", fails=2)
    assert "error: model and data missing: name a config (--config sft, say; " in quick
    without_snapshot(monkeypatch)
    assert cli("fit", "--lora.r", "3", fails=2) == quick


def test_verbs(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli() == cli("-h") == cli("--help")
    quick = cli("fti", "--config", "my.yaml", fails=2)
    assert quick == (
        "lora-lightning: error: there is no verb 'fti'. Did you mean 'fit'?\n"
        "All verbs: lora-lightning --help\n"
    )
    assert "there is no verb; it comes first." in cli("--config", "my.yaml", fails=2)
    without_snapshot(monkeypatch)
    assert cli("fti", "--config", "my.yaml", fails=2) == quick


def test_config_files(cli: Any, folder: Path) -> None:
    text = cli("fit", "--config", "mu.yaml", fails=1)
    assert f"There is no config 'mu.yaml' in {str(folder)!r}. Did you mean 'my.yaml'?" in text
    assert len(text.splitlines()) == 1
    (folder / "tab.yaml").write_text("lora:\n  r: 2\n\talpha: 3\n")
    text = cli("fit", "--config=tab.yaml", fails=1)
    assert "ConfigError: 'tab.yaml', line 3, column 1: found a tab character" in text
    (folder / "open.yaml").write_text("lora: {r: 2\nmodel: [a\n")
    assert "'open.yaml', line 2, column 6: " in cli("fit", "-c", "open.yaml", fails=1)
    (folder / "text.yaml").write_text("only words")
    assert "'text.yaml' holds str 'only words'; a config is a mapping" in cli(
        "validate", "--config", "text.yaml", fails=1
    )
    (folder / "bytes.yaml").write_bytes(b"lora: \xff\xfe")
    assert "'bytes.yaml' cannot be read as YAML" in cli("fit", "--config", "bytes.yaml", fails=1)
    assert len(os.listdir(folder)) == 6  # nothing was made


def demo(run: Any, out: str, r: int = 3, force: bool = False) -> None:
    """Turn a run into something. And more.

    With a paragraph about it.

    Args:
        run: A run.
        out: Where to.
        r: A rank.
        force: Replace it.

    """


def test_a_verb_that_is_a_function(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """From its signature and docstring: the two parsers say the same."""
    monkeypatch.setattr(lora_lightning, "demo", demo, raising=False)
    monkeypatch.setitem(verbs.VERBS, "demo", verbs.Verb())
    found = from_json(to_json(asked_parsers.__wrapped__()))
    text = help_of_verb("demo", found)
    assert text.startswith("usage: lora-lightning demo RUN OUT [--OPTION VALUE ...]\n\nTurn a run")
    for line in ("With a paragraph about it.", "--r INT", "A rank. (default: 3)", "--config FILE"):
        assert line in text
    assert (
        "\n  demo       Turn a run into something.\n" in help_of_command(found).split("after:")[1]
    )
    good = [["a", "b"], ["a", "b", "--r=4", "--force=true"]]
    for arguments in good:
        check_arguments("demo", arguments, [], found)
    check_arguments("demo", ["--config", "a.yaml", "b"], [{}], found)
    for arguments, wanted in (
        (["a"], "the following arguments are required: out\nAll options: lora-lightning demo"),
        (["a", "b", "--foce"], "unrecognized arguments: --foce. Did you mean '--force'?"),
        (["a", "b", "--r", "x"], "r takes an integer, not 'x'. (r)"),
    ):
        said = []
        for check in (
            lambda: check_arguments("demo", arguments, [], found),  # noqa: B023
            lambda: parser_of("demo", demo).parse_args(arguments),  # noqa: B023
        ):
            with pytest.raises(SystemExit):
                check()
            said.append(capsys.readouterr().err)
        assert wanted in said[0]
        assert said[0] == said[1]
