"""Rows of every kind of source: what they say, where they stand, lazily and from any position."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning.data.sources.read_rows import Row, read_rows
from lora_lightning.errors import RecordError, printable
from tests.helpers.messages import message_of

VALUES = [{"text": f'row {number}, ünd "so"', "label": str(number % 3)} for number in range(10)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows):
    lines = (f'"{row["text"]}"'.replace('"so"', '""so""') + f",{row['label']}" for row in rows)
    return "\n".join(["text,label", *lines, ""])


CONTENTS = {
    "a.jsonl": jsonl(VALUES),
    "a.json": jsonl(VALUES),
    "array.json": json.dumps(VALUES, indent=1),
    "a.csv": as_csv(VALUES),
}
SOURCES = [
    *CONTENTS, "a.jsonl.gz", "a.csv.gz", "array.json.gz", "a.parquet", "files/*.jsonl", "files",
    "saved", "org/name:train", "streamed",
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write_file


def rows(source, key="data.train", **options):
    return list(read_rows(str(source), key=key, **options))


def values(source, **options):
    return [row.values for row in rows(source, **options)]


def message(source, **options):
    return message_of(RecordError, rows, source, **options)


def write_parquet(path, table=None):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow (extra `data`)")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(VALUES) if table is None else table
    parquet.write_table(table, path, row_group_size=4)
    return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one dataset: the real `load_dataset`, given a folder of two splits instead."""
    datasets = pytest.importorskip("datasets", reason="datasets are read by datasets")
    folder = tmp_path / "of the hub"
    folder.mkdir()
    for name, part in (("train-0", VALUES[:6]), ("train-1", VALUES[6:]), ("test-0", VALUES[:1])):
        (folder / f"{name}.jsonl").write_text(jsonl(part))
    real, asked = datasets.load_dataset, []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        if path != "org/name":
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub (no network)")
        return real(str(folder), name, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture(params=SOURCES)
def source(request, write, tmp_path):
    """A source of `VALUES`, and how it is asked for."""
    name = request.param
    if name == "a.parquet":
        return write_parquet(tmp_path / name), {}
    if name.startswith("files"):
        for number in (2, 0, 1):  # they are read in order of their names
            write(f"files/{number}.jsonl", jsonl(VALUES[4 * number : 4 * number + 4]))
        return str(tmp_path / name), {}
    if name == "saved":
        datasets = pytest.importorskip("datasets", reason="datasets are read by datasets")
        datasets.Dataset.from_list(VALUES).save_to_disk(str(tmp_path / name))
        return str(tmp_path / name), {}
    if name in ("org/name:train", "streamed"):
        request.getfixturevalue("hub")
        return "org/name:train", {"streaming": name == "streamed"}
    return write(name, CONTENTS[name.removesuffix(".gz")]), {}


def test_every_source_gives_the_same_rows_from_any_position(source):
    path, options = source
    everything = rows(path, **options)
    assert [row.values for row in everything] == VALUES
    assert len({row.where for row in everything}) == len(VALUES)
    for skip in (1, 4, 5, 9, 10, 11):
        assert rows(path, skip=skip, **options) == everything[skip:]


def test_columns_that_are_asked_for(source):
    path, options = source
    texts = [row.values["text"] for row in rows(path, columns={"text": "data.text"}, **options)]
    assert texts == [row["text"] for row in VALUES]
    text = message(path, columns={"labels": "data.label"}, **options)
    assert "no column 'labels'. Columns found: text, label. Did you mean 'label'?" in text
    assert text.endswith("(data.label)")


def test_where_rows_stand(write, tmp_path):
    def places(path, **options):
        return [row.where.removeprefix(path) for row in rows(path, **options)]

    path = write("a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')
    assert places(path) == [", line 2", ", line 4"]
    assert places(path, skip=1) == [", line 4"]
    assert places(write("a.json", '[{"a": 1},\n\n {"a":\n2}, {"a": 3}\n]\n')) == [
        ", line 1", ", line 3", ", line 4",
    ]  # fmt: skip
    assert places(write("a.csv", 'a,b\n1,"x\ny"\n2,z\n')) == [", line 2", ", line 4"]
    assert places(write("a.txt", "\none\n\n two\n")) == [", line 2", ", line 4"]
    assert places(write_parquet(tmp_path / "a.parquet"), skip=6) == [
        ", row 6", ", row 7", ", row 8", ", row 9",
    ]  # fmt: skip


def test_a_text_file_has_a_row_per_line(write):
    path = write("a.txt", "\ufeff one \r\n\n   \ntwo\u2028three")
    assert rows(path) == [
        Row({"text": " one "}, f"{path}, line 1"),
        Row({"text": "two\u2028three"}, f"{path}, line 4"),
    ]
    assert message(path, columns={"label": "data.label_column"}) == (
        f"{path}: no column 'label'. Columns found: text. (data.label_column)"
    )


@pytest.mark.parametrize("kind", ["json", "csv", "text", "parquet"])
def test_the_rows_are_those_that_datasets_reads(kind, write, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is the independent reader")
    if kind == "parquet":
        path = write_parquet(tmp_path / "a.parquet")
    else:
        name = {"json": "a.jsonl", "csv": "a.csv", "text": "a.txt"}[kind]
        path = write(name, CONTENTS.get(name, "one \ntwo\n  three"))
    strings = datasets.Features(text=datasets.Value("string"), label=datasets.Value("string"))
    options = {"keep_default_na": False, "features": strings} if kind == "csv" else {}
    theirs = datasets.load_dataset(
        kind, data_files=path, split="train", cache_dir=str(tmp_path / "cache"), **options
    )
    assert values(path) == list(theirs)


def test_rows_are_read_as_they_are_asked_for(write):
    path = write("a.jsonl", '{"a": 1}\n{"a": 2}\nbroken\n')
    reader = read_rows(path, key="data.train")
    assert [next(reader).values, next(reader).values] == [{"a": 1}, {"a": 2}]
    with pytest.raises(RecordError, match="line 3, column 1: broken JSON"):
        next(reader)


def test_rows_passed_over_are_not_parsed(write):
    path = write("a.jsonl", 'broken\n{"a": 2}\n')
    assert values(path, skip=1) == [{"a": 2}]
    assert "line 1, column 1: broken JSON" in message(path)


def test_row_groups_passed_over_are_not_read(tmp_path, monkeypatch):
    path, groups = write_parquet(tmp_path / "a.parquet"), []
    from pyarrow.parquet import ParquetFile

    real = ParquetFile.iter_batches

    def iter_batches(self, *args, row_groups, **options):
        groups.append(row_groups)
        return real(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(ParquetFile, "iter_batches", iter_batches)
    assert values(path, skip=8) == VALUES[8:]
    assert groups == [[2]]
    next(read_rows(path, key="data.train"))
    assert groups == [[2], [0]]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"a": 1}\n {"a": 2}]', "line 2, column 2: broken JSON: Expecting ',' or ']'."),
        ('[{"a": 1},\n{"a" 2}]', "line 2, column 6: broken JSON: Expecting ':' delimiter."),
        ('[{"a": 1},', "line 1, column 11: broken JSON: Expecting value."),
        ('[{"a": 1}', "line 1, column 10: broken JSON: Expecting ',' or ']'."),
        ('[{"a": 1}]\n[]', "line 2, column 1: broken JSON: Extra data."),
    ],
)
def test_broken_json_arrays(write, content, problem):
    path = write("a.json", content)
    assert message(path) == (
        f"{path}, {problem} The file must be one complete JSON array of objects."
    )


def test_elements_that_are_no_objects(write):
    path = write("a.json", '[{"a": 1},\n"b"]')
    assert message(path).startswith(f"{path}, line 2: expected a JSON object, found str.")
    assert rows(write("b.json", " [ ] ")) == []


def test_json_that_is_neither_array_nor_lines(write):
    path = write("a.json", '{\n"data": []}')
    assert message(path) == (
        f"{path}, line 1, column 2: broken JSON: Expecting property name enclosed in double "
        "quotes. Each line must be one complete JSON object. (Or the file one array of them.)"
    )


def test_long_csv_fields(write):
    text = "word " * 40_000  # Python's own limit is 131,072 characters
    assert values(write("a.csv", f"text\n{text}\n")) == [{"text": text}]


def test_a_csv_header_that_names_a_column_twice(write):
    path = write("a.csv", "\ntext,label,text\na,b,c\n")
    assert message(path) == f"{path}, line 2: the header names the column 'text' twice."


def test_a_broken_gzip(write, tmp_path):
    path = write("a.jsonl.gz", jsonl(VALUES))
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-12])
    assert message(path).startswith(f"{path}, after line ")
    assert "broken gzip: Compressed file ended before" in message(path)
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"a": 1}\n')
    assert "after line 0: broken gzip: Not a gzipped file" in message(path)


def test_a_broken_parquet_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    assert message(path).startswith(f"{path}: broken Parquet file: Parquet magic bytes not found")


def test_folders_of_several_kinds_or_splits(write, tmp_path):
    write("kinds/a.jsonl", "")
    write("kinds/b.txt", "")
    write("kinds/LICENSE", "")
    folder = tmp_path / "kinds"
    assert message(folder) == (
        f"{folder}: holds files of several kinds (.jsonl, .txt). Name one kind by a pattern, such "
        f"as '{folder / '*.jsonl'}'. (data.train)"
    )
    write("splits/my-train-0.csv", "text\n")
    write("splits/my_test.csv", "text\n")
    write("splits/contest.csv", "text\n")
    folder = tmp_path / "splits"
    assert message(folder) == (
        f"{folder}: holds files of several splits (contest.csv, my-train-0.csv, my_test.csv). "
        f"Name the files of one, such as '{folder / 'my_test.csv'}' or a pattern. (data.train)"
    )
    assert rows(folder / "*train*.csv") == []


@pytest.mark.parametrize(
    "text",
    ["What is 2+2?", "some text", "What is 2/3 of 6?", "Question: why?", "a\nb.jsonl", "a\0 b",
     '{"prompt": "Hi"}', "x" * 5000, "~nobody-here/a b", "\x1b[31m red"],
)  # fmt: skip
def test_a_text_is_no_file(text: str) -> None:
    found = message(text, key="data.predict")
    shown = printable(repr(text if len(text) <= 60 else f"{text[:60]}..."))
    assert found == (
        f"{shown} is no file, folder or dataset, but reads like a text; data.predict names where "
        "rows are read from. Write its rows into a file (.jsonl, .csv, .txt, ...), and name that; "
        "or have one prompt of a language model answered at once: lora-lightning generate RUN "
        "--prompt '...'. (data.predict)"
    )
    assert "generate" not in message(text)  # of training data


def test_a_file_is_no_text(write, tmp_path):
    for name in ("my data.txt", "two words", "my folder/a.txt"):
        write(name, "one\n")
    assert values(tmp_path / "my data.txt") == [{"text": "one"}]
    assert len(rows(tmp_path / "my folder")) == 1
    assert "unknown file type" in message(tmp_path / "two words")
    assert message(tmp_path / "two wrds").startswith(f"{tmp_path / 'two wrds'}: no such file.")
    assert message("other data/a.txt").startswith("other data/a.txt: no such file")


def test_patterns_without_files_or_with_others(write, tmp_path):
    write("a.jsonl", "")
    write("a.md", "")
    pattern = tmp_path / "b*.jsonl"
    assert message(pattern) == f"{pattern}: no file matches this pattern. (data.train)"
    pattern = tmp_path / "a.*"
    assert message(pattern) == (
        f"{pattern}: matches files of an unknown type: {tmp_path / 'a.md'}. Known: .jsonl, .json, "
        ".csv, .txt (also with .gz), .parquet. (data.train)"
    )


def test_class_names_also_in_lists_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets", reason="class names are an idea of datasets")
    classes = datasets.ClassLabel(names=["neg", "pos"])
    dataset = datasets.Dataset.from_dict(
        {"label": [1, -1, None], "tags": [[0, 1], [], [1]], "number": [1, 0, 1]},
        features=datasets.Features(
            label=classes, tags=datasets.List(classes), number=datasets.Value("int64")
        ),
    )
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    for source in ("saved", "a.parquet"):
        assert values(tmp_path / source) == [
            {"label": "pos", "tags": ["neg", "pos"], "number": 1},
            {"label": None, "tags": [], "number": 0},
            {"label": None, "tags": ["pos"], "number": 1},
        ]


def test_a_dataset_saved_as_tensors_is_read_as_values(tmp_path):
    datasets = pytest.importorskip("datasets", reason="dataset folders are written by datasets")
    dataset = datasets.Dataset.from_dict({"tags": [[0, 1]]}).with_format("torch")
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert values(tmp_path / "saved") == [{"tags": [0, 1]}]


def test_names_of_hub_datasets(hub):
    assert values("org/name") == VALUES  # `train` is what data.train means
    assert len(rows("org/name:test")) == 1
    assert values("org/name:train[2:4]") == VALUES[2:4]
    with pytest.raises(RecordError) as error:
        read_rows("org/name", key="data.val")
    assert str(error.value) == (
        "org/name: holds several splits (train, test). Name one of them, such as 'org/name:train'. "
        "(data.val)"
    )
    assert rows("org/name:default:test")[0].where == "org/name:default:test, row 0"
    asked = [(name, options["split"]) for _, name, options in hub]
    assert asked == [
        (None, None), (None, "test"), (None, "train[2:4]"), (None, None), ("default", "test"),
    ]  # fmt: skip


def test_hub_datasets_that_cannot_be_loaded(hub, write, tmp_path, monkeypatch):
    assert message("org/nmae") == (
        "org/nmae: no such file or folder, and no such dataset could be loaded: Couldn't reach "
        "'org/nmae' on the Hub (no network). Name a file, a folder, or a dataset of the Hugging "
        "Face hub as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT. (data.train)"
    )
    assert 'could be loaded: Unknown split "tset". Should be one of' in message("org/name:tset")
    assert "could be loaded: BuilderConfig 'en' not found" in message("org/name:en:train")
    write("mydata/a.txt", "")
    monkeypatch.chdir(tmp_path)
    assert "(no network). Did you mean 'mydata'? Name a file" in message("mydat")
    # what can only be a file is not looked for on the hub
    for path in ("trian.jsonl", "./trian", "a/b/c", "~/data"):
        assert "could be loaded" not in message(path)


def test_a_hub_that_is_out_of_reach():
    """The real `load_dataset`, told to be offline."""
    pytest.importorskip("datasets", reason="datasets are read by datasets")
    code = "from lora_lightning.data.sources.read_rows import read_rows; read_rows('org/name', key='data.train')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (
        "RecordError: org/name: no such file or folder, and no such dataset could be loaded: "
        in (done.stderr)
    )
    assert done.stderr.rstrip().endswith("(data.train)")


def test_hub_datasets_without_the_datasets_package(monkeypatch):
    real_import = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    assert message("org/name") == (
        "org/name: reading a dataset of the Hugging Face hub needs the package 'datasets'. "
        'Install it with: pip install "lora_lightning[data]" (data.train)'
    )


class Streamed(IterableDataset):
    def __iter__(self):
        return (row.values["text"] for row in self.rows())

    def rows(self):
        return read_rows("org/name:train", key="data.train", streaming=True)


class StreamedByDatasets(Streamed):
    def rows(self):
        import datasets

        stream = datasets.load_dataset("org/name", split="train", streaming=True)
        return (Row(values, "") for values in stream)


def test_every_worker_sees_all_rows_of_a_stream(hub):
    """Which of them it serves is the data module's choice; `datasets` would choose, too."""

    def served(dataset):
        loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
        return sorted(loader)

    expected = sorted(row["text"] for row in VALUES)
    assert served(Streamed()) == sorted(2 * expected)
    assert served(StreamedByDatasets()) == expected


def test_hidden_files_of_a_folder_are_none(write, tmp_path):
    write("files/a.jsonl", '{"a": 1}\n')
    write("files/._a.jsonl", b"\x00\x05\x16\x07\xff")  # macOS writes them beside the others
    assert values(tmp_path / "files") == values(tmp_path / "files" / "*.jsonl") == [{"a": 1}]


def test_a_file_of_several_that_cannot_be_read_is_not_left_out(write, tmp_path):
    write("files/a.jsonl", '{"a": 1}\n')
    (tmp_path / "files" / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for source in (tmp_path / "files", tmp_path / "files" / "*.jsonl"):
        assert message(source) == (
            f"{tmp_path / 'files' / 'b.jsonl'}: cannot be read: No such file or directory. Make "
            "sure that the file is there and that you may read it."
        )


def test_class_names_in_lists_of_lists(tmp_path):
    datasets = pytest.importorskip("datasets", reason="class names are an idea of datasets")
    tags = datasets.List(datasets.List(datasets.ClassLabel(names=["neg", "pos"])))
    dataset = datasets.Dataset.from_dict(
        {"tags": [[[0, 1], []]]}, features=datasets.Features(tags=tags)
    )
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert values(tmp_path / "saved") == [{"tags": [["neg", "pos"], []]}]


@pytest.mark.parametrize("noted", ["{}", '{"info": {"features": null}}'])
def test_a_parquet_file_of_which_datasets_noted_no_features(noted, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow (extra `data`)")
    table = pyarrow.Table.from_pylist(VALUES).replace_schema_metadata({"huggingface": noted})
    assert values(write_parquet(tmp_path / "a.parquet", table)) == VALUES


def test_saved_datasets_that_are_empty_or_damaged(tmp_path):
    datasets = pytest.importorskip("datasets", reason="dataset folders are written by datasets")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "empty"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{")
    for name in ("empty", "damaged"):
        text = message(tmp_path / name)
        assert f"{tmp_path / name}: this dataset has no rows, or its folder is damaged (" in text
        assert text.endswith("Save it again, with rows. (data.train)")


# -- files that were made to do harm ---------------------------------------------------------------


PIPE = "is no ordinary file but a device, a pipe or the like, which may never end."


def test_what_may_never_end_is_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("pipe.jsonl", "pipe", "folder/pipe.csv", "pipe.parquet", "pipe.json.gz"):
        os.mkfifo(tmp_path / name)
        assert message(tmp_path / name) == (
            f"{tmp_path / name}: {PIPE} Write what it gives into a file, and name that. (data.train)"
        )
    assert PIPE in message(tmp_path / "folder")
    assert PIPE in message(tmp_path / "folder" / "*.csv")
    (tmp_path / "zeros.txt").symlink_to("/dev/zero")
    assert PIPE in message(tmp_path / "zeros.txt")
    assert PIPE in message("/dev/zero")


def test_a_link_to_a_file_is_a_file(write, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(write("a.jsonl", CONTENTS["a.jsonl"]))
    assert values(tmp_path / "link.jsonl") == VALUES


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "a.txt.gz", "a.csv.gz"])
def test_a_line_without_end(name, write, monkeypatch):
    monkeypatch.setattr("lora_lightning.data.sources.files.LONGEST_LINE", 1000)
    start = "a\n" if "csv" in name else "\n"
    assert message(write(name, start + "x" * 5_000_000)).endswith(
        f"{name}, line 2: is longer than 1,000 bytes. Break it up: of JSON, one object a line "
        "(.jsonl)."
    )
    as_long_as_may_be = write(name, f"text\n{'x' * 999}\n" if "csv" in name else '["' + "x" * 900)
    if "csv" in name or "txt" in name:
        assert values(as_long_as_may_be)


def test_a_csv_field_without_end(write, monkeypatch):
    monkeypatch.setattr("lora_lightning.data.sources.files.LONGEST_LINE", 1000)
    path = write("a.csv", 'text\n"' + "x\n" * 5000)
    assert message(path) == f"{path}, line 2: broken CSV: field larger than field limit (1000)."


DEEP = {
    "lists": "[" * 200_000 + "]" * 200_000,
    "objects": '{"a":' * 200_000 + "1" + "}" * 200_000,
    "that do not end": "[" * 200_000,
    "that Python's reader takes": "[" * 200 + "]" * 200,
}


@pytest.mark.parametrize("nested", DEEP.values(), ids=DEEP)
def test_a_row_nested_without_end(nested, write):
    good = '{"text": "a"}'
    assert "a.jsonl, line 2: lists" in message(write("a.jsonl", f'{good}\n{{"text": {nested}}}\n'))
    array = write("a.json", f'[{good},\n{good},\n{{"text": {nested}}}]')
    assert "a.json, line 3: lists" in message(array)


def test_what_is_deep_enough_for_anybody_is_a_row(write):
    tools = '{"text": ' + '{"a": [' * 45 + "]}" * 45 + "}"
    assert len(values(write("a.jsonl", tools))) == 1


def test_a_number_of_a_hundred_thousand_digits(write):
    row = '{"text": "a", "id": ' + "9" * 100_000 + "}"
    for name, content in (("a.jsonl", f"\n{row}\n"), ("a.json", f"[\n{row}]")):
        assert f"{name}, line 2: holds a number of too many digits" in message(write(name, content))


@pytest.mark.parametrize(
    "noted", [b"{", b"[" * 100_000, b"[]", b'{"info": ' + b"[" * 300 + b"]" * 300 + b"}"]
)
def test_a_parquet_file_with_other_metadata(noted, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow (extra `data`)")
    table = pyarrow.Table.from_pylist(VALUES).replace_schema_metadata({b"huggingface": noted})
    assert message(write_parquet(tmp_path / "a.parquet", table)).startswith(
        f"{tmp_path / 'a.parquet'}: "
    )


def test_a_path_is_a_source_too(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    rows = [*read_rows(tmp_path / "rows.jsonl", key="data.train")]
    assert [row.values["text"] for row in rows] == ["a", "b"]
