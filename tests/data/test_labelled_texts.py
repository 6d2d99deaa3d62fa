import builtins
import json

import pytest

from lora_lightning.data.sources.labelled_texts import Record, read_records
from lora_lightning.errors import RecordError
from tests.helpers.messages import message_of


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def message(path, **options):
    return message_of(RecordError, read_records, path, key="data.train", **options)


def test_jsonl(write):
    path = write("a.jsonl", '{"text": "one", "label": "x"}\r\n\n{"label": 3, "text": "tw\\no"}')
    assert read_records(path, key="data.train") == [
        Record("one", "x", f"{path}, line 1"),
        Record("tw\no", "3", f"{path}, line 3"),
    ]


def test_csv_rows_are_named_by_the_line_they_begin_on(write):
    path = write("a.csv", '\ufefflabel,text\nx,one\ny,"two\nlines"\n\nz,"a, ""b"""\n')
    assert read_records(path, key="data.train") == [
        Record("one", "x", f"{path}, line 2"),
        Record("two\nlines", "y", f"{path}, line 3"),
        Record('a, "b"', "z", f"{path}, line 6"),
    ]


def test_other_columns_and_texts_without_labels(write):
    path = write("a.json", '{"body": "one", "kind": "x", "more": [1]}\n')
    assert read_records(path, key="data.test", text_column="body", label_column="kind") == [
        Record("one", "x", f"{path}, line 1")
    ]
    assert read_records(path, key="data.predict", text_column="body", label_column=None) == [
        Record("one", None, f"{path}, line 1")
    ]


def test_missing_file(write, tmp_path):
    near = write("train.jsonl", "{}")
    wanted = str(tmp_path / "trian.jsonl")
    assert message(wanted) == f"{wanted}: no such file. Did you mean {near!r}? (data.train)"
    far = str(tmp_path / "no" / "train.csv")
    assert message(far) == (
        f"{far}: no such file; the folder {tmp_path / 'no'} does not exist either. (data.train)"
    )


def test_unknown_extension(write):
    path = write("a.xlsx", "")
    assert message(path) == (
        f"{path}: unknown file type '.xlsx'. Known: .jsonl, .json, .csv, .txt (also with .gz), "
        ".parquet, a folder of such files, or a folder saved by datasets.Dataset.save_to_disk. "
        "(data.train)"
    )


def test_broken_json(write):
    path = write("a.jsonl", '{"text": "one", "label": "x"}\n{"text": "two" "label": "x"}\n')
    assert message(path) == (
        f"{path}, line 2, column 16: broken JSON: Expecting ',' delimiter. "
        "Each line must be one complete JSON object."
    )


def test_a_line_that_is_no_object(write):
    path = write("a.jsonl", '["one", "x"]\n')
    assert message(path) == (
        f"{path}, line 1: expected a JSON object, found list. "
        'Each row must be one object such as {"text": "...", "label": "..."}.'
    )


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"texts": "one", "lable": "x"}'), ("a.csv", "texts,lable\n")]
)
def test_missing_columns(write, name, content):
    path = write(name, content)
    assert message(path) == (
        f"{path}, line 1: no column 'text'. Columns found: texts, lable. Did you mean 'texts'? "
        "(data.text_column)"
    )
    assert message(path, text_column="texts") == (
        f"{path}, line 1: no column 'label'. Columns found: texts, lable. Did you mean 'lable'? "
        "(data.label_column)"
    )


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"text": "  "}, "'text': the text is empty. Remove the record or fill it in."),
        ({"text": 5}, "'text': the text must be a string, found int 5."),
        ({"text": None}, "'text': the text must be a string, found null."),
        ({"label": None}, "'label': the label is missing. Remove the record or fill it in."),
        ({"label": ""}, "'label': the label is missing. Remove the record or fill it in."),
        ({"label": 0.5}, "'label': the label must be a string or an integer, found float 0.5."),
        ({"label": True}, "'label': the label must be a string or an integer, found bool True."),
    ],
)
def test_unusable_values(write, fields, problem):
    good = {"text": "one", "label": "x"}
    path = write("a.jsonl", json.dumps(good) + "\n" + json.dumps({**good, **fields}))
    assert message(path) == f"{path}, line 2, column {problem}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_empty_files(write, name):
    path = write(name, "\n")
    assert message(path) == f"{path}: no records; the file is empty. (data.train)"


def test_a_csv_header_without_rows(write):
    assert "no records" in message(write("a.csv", "text,label\n"))


def test_a_csv_row_with_other_fields_than_the_header(write):
    for row, count in (("two, three,y", 3), ("two", 1)):
        path = write("a.csv", f"text,label\none,x\n{row}\n")
        assert message(path) == (
            f"{path}, line 3: found {count} fields, but the header has 2 (text, label). "
            "A field that holds commas, quotes or line breaks must be quoted."
        )


def test_an_unclosed_quote_does_not_swallow_the_file(write):
    path = write("a.csv", 'text,label\none,x\n"two,y\nthree,z\n')
    assert message(path) == f"{path}, line 3: broken CSV: unexpected end of data."


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_bytes_that_are_not_utf8(write, name):
    head = b'{"text": "one", "label": "x"}\n' if name == "a.jsonl" else b"text,label\n"
    path = write(name, head + "café,x\n".encode("latin-1"))
    assert message(path) == (
        f"{path}, line 2, byte 4: not UTF-8 (invalid continuation byte). Save the file as UTF-8."
    )


@pytest.fixture
def dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"])
    )
    rows = {"text": ["one", "two"], "label": [1, 0]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_dataset_folder_with_class_names(dataset, tmp_path):
    folder = str(tmp_path / "saved")
    dataset.save_to_disk(folder)
    assert read_records(folder, key="data.train") == [
        Record("one", "pos", f"{folder}, row 0"),
        Record("two", "neg", f"{folder}, row 1"),
    ]
    assert [r.label for r in read_records(folder, key="data.predict", label_column=None)] == [
        None,
        None,
    ]
    assert message(folder, text_column="txt") == (
        f"{folder}: no column 'txt'. Columns found: text, label. Did you mean 'text'? "
        "(data.text_column)"
    )


def test_dataset_rows_without_a_class(dataset, tmp_path):
    folder = str(tmp_path / "saved")
    rows = dataset.to_dict() | {"label": [1, None]}
    type(dataset).from_dict(rows, features=dataset.features).save_to_disk(folder)
    assert f"{folder}, row 1, column 'label': the label is missing." in message(folder)


def test_a_dataset_dict_asks_for_a_split(dataset, tmp_path):
    import datasets

    folder = tmp_path / "saved"
    datasets.DatasetDict(test=dataset, train=dataset).save_to_disk(str(folder))
    assert message(str(folder)) == (
        f"{folder}: holds several splits (test, train). "
        f"Name one of them, such as '{folder / 'test'}'. (data.train)"
    )
    assert len(read_records(str(folder / "train"), key="data.train")) == 2


def test_a_folder_that_is_no_dataset(tmp_path):
    assert message(str(tmp_path)) == (
        f"{tmp_path}: is a folder, but holds no data files (.jsonl, .json, .csv, .txt (also with "
        ".gz), .parquet) and was not saved by datasets.Dataset.save_to_disk (no state.json). "
        "(data.train)"
    )


def test_dataset_folder_without_the_datasets_package(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    real_import = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    assert message(str(tmp_path)) == (
        f"{tmp_path}: reading a dataset folder needs the package 'datasets'. "
        'Install it with: pip install "lora_lightning[data]" (data.train)'
    )
