"""Words and their labels: rows, sub-tokens, batches."""

import json
import logging

import pytest
import torch

from lora_lightning.data.sources.labelled_words import first_subtokens
from lora_lightning.data.token_classification import TokenClassificationDataModule
from lora_lightning.errors import ConfigError, RecordError
from tests.helpers.messages import message_of
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_lm import tiny_tokenizer

SENTENCES = [
    {"tokens": ["The", "film", "was", "very", "good"], "labels": ["O", "B", "O", "I", "I"]},
    {"tokens": ["book-film", "bad"], "labels": ["B", "I"]},
]
TRAIN = [{"tokens": [f"w{n}", "film"], "labels": [["B", "I", "O"][n % 3], "O"]} for n in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_bert(tmp_path_factory.mktemp("model")))


@pytest.fixture
def write(tmp_path):
    def write_file(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_file


def data_of(model, stage, **options):
    data = TokenClassificationDataModule(**{"tokenizer": model, "max_length": 16, **options})
    data.setup(stage)
    return data


def message(model, stage="test", error_type=RecordError, **options):
    return message_of(error_type, data_of, model, stage, **options)


TEXT = ["Hello", "world!", "unbelievable", "C3PO-like", "😀", "été", "Paris"]


@pytest.mark.parametrize("manner", ["gpt2", "llama3", "sentencepiece", "sentencepiece-prefix"])
def test_words_are_found_in_running_text(manner):
    """A word begins where the tokenizer's mark of a blank is: that is the independent truth."""
    tokenizer = tiny_tokenizer(bos="<s>", manner=manner)
    encoded = tokenizer(" ".join(TEXT), return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens[0] == "<s>"
    assert len(tokens) > len(TEXT) + 5  # words of several sub-tokens
    mark = "▁" if manner.startswith("sentencepiece") else "Ġ"
    first, *later = [i for i, token in enumerate(tokens) if token.startswith(mark) or i == 1]
    truth = [first, *later]
    found = first_subtokens(TEXT, encoded["offset_mapping"])
    # A mark may be a token of its own, which stands for the blank alone; the first, which no blank
    # of the text is behind, is said to stand for the first character.
    alone = [i for i in later if tokens[i] == mark]
    assert found == [i + 1 if i in alone else i for i in truth]


def test_words_given_one_by_one_would_be_other_tokens():
    """Why words are joined: byte-level tokenizers would miss the blank before each."""
    tokenizer = tiny_tokenizer(manner="gpt2")
    words = ["What", "is", "the", "capital"]
    joined = tokenizer(" ".join(words))["input_ids"]
    assert joined != tokenizer(words, is_split_into_words=True)["input_ids"]


def test_it_agrees_with_word_ids_where_blanks_do_not_matter(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = ["The", "book-film", "was", "'bad'", "...", "very"]
    split = tokenizer(words, is_split_into_words=True)
    ids = split.word_ids()
    encoded = tokenizer(" ".join(words), return_offsets_mapping=True)
    assert encoded["input_ids"] == split["input_ids"]
    assert first_subtokens(words, encoded["offset_mapping"]) == [ids.index(w) for w in range(6)]


@pytest.mark.parametrize(
    ("words", "offsets", "places"),
    [
        (["ab", "cd"], [(0, 0), (0, 2), (3, 5), (0, 0)], [1, 2]),
        (["ab", "cd"], [(0, 0), (0, 2), (0, 0)], [1, None]),
        (["ab", "", "cd"], [(0, 2), (4, 6)], [0, None, 1]),
        (["a", "b", "c"], [(0, 3), (4, 5)], [0, None, 1]),
        (["ab", "cd"], [(0, 2), (2, 5)], [0, 1]),
        (["ab", "cd"], [(0, 1), (1, 2), (2, 3), (3, 5)], [0, 3]),
        (["😀", "x"], [(0, 1), (0, 1), (0, 1), (2, 3)], [0, 3]),
        (["\u200b", "x"], [(2, 3)], [None, 0]),
    ],
    ids=[
        "special tokens", "cut off", "an empty word", "a token of two words",
        "a token begins with the blank", "a token of the blank", "several tokens of one character",
        "a character that is dropped",
    ],
)  # fmt: skip
def test_first_subtokens(words, offsets, places):
    assert first_subtokens(words, offsets) == places


def test_batches_hold_labels_at_first_subtokens(model, write):
    path = write("a.jsonl", SENTENCES)
    data = data_of(model, "test", test=path, label_names=["O", "B", "I"])
    batch = next(iter(data.test_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    # [CLS] book - film bad [SEP], padded; [CLS] the film was very good [SEP]
    assert batch["labels"].tolist() == [
        [-100, 1, -100, -100, 2, -100, -100],
        [-100, 0, 1, 0, 2, 2, -100],
    ]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 7)


def test_padding_follows_the_tokenizers_side(tmp_path, write):
    tiny_tokenizer().save_pretrained(tmp_path / "left")
    (tmp_path / "left" / "config.json").write_text("{}")
    rows = [
        {"tokens": ["is", "the", "of"], "tags": ["a", "b", "b"]},
        {"tokens": ["is"], "tags": ["a"]},
    ]
    path = write("a.jsonl", rows)
    data = data_of(str(tmp_path / "left"), "test", test=path, label_names=["a", "b"])
    data.tokenizer.padding_side = "left"
    batch = next(iter(data.test_dataloader()))
    assert (batch["labels"] != -100).tolist() == (batch["attention_mask"] == 1).tolist()
    assert batch["labels"][0].tolist() == [-100, -100, 0]


def test_batches_to_predict_number_the_words(model, write):
    path = write("a.jsonl", SENTENCES)
    data = data_of(model, "predict", predict=path, label_names=["O", "B", "I"], max_length=5)
    batch = next(iter(data.predict_dataloader()))
    assert "labels" not in batch
    assert batch["words"].tolist() == [[-100, 0, 1, 2, -100], [-100, 0, -100, -100, -100]]
    assert batch["word_count"].tolist() == [5, 2]


def test_what_was_cut_and_lost_is_counted(model, write, caplog):
    rows = [*SENTENCES, {"tokens": ["a", "", "film"], "labels": ["O", "O", "B"]}]
    path = write("a.jsonl", rows)
    options = {"test": path, "label_names": ["O", "B", "I"]}
    with caplog.at_level(logging.INFO):
        data_of(model, "test", max_length=5, **options)
        data_of(model, "test", max_length=7, **{**options, "test": write("b.jsonl", SENTENCES)})
    first, second = (r.getMessage() for r in caplog.records if r.getMessage().startswith("test:"))
    assert first == (
        "test: 3 sentences, 10 words; 2 sentences cut to 5 tokens (data.max_length), 3 words lost "
        "with that; 1 words have no token of their own"
    )
    assert second == (
        "test: 2 sentences, 7 words; 0 sentences cut to 7 tokens (data.max_length), 0 words lost "
        "with that"
    )


def test_equal_sentences_share_a_side(model, write):
    data = data_of(model, "fit", train=write("a.jsonl", TRAIN * 3), val=0.3)
    sides = [{s.words for s in data.records(split)} for split in ("train", "val")]
    assert data.label_names == ["B", "I", "O"]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert data.label_column == "labels"


def test_saved_datasets_name_their_classes(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")),
        ner_tags=datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"])),
    )
    rows = {"tokens": [["good", "film"], ["bad"]], "ner_tags": [[1, 0], [2]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    path = str(tmp_path / "set")
    data = data_of(model, "fit", train=path, val=path)
    assert data.label_names == ["B-PER", "I-PER", "O"]
    assert [sentence.labels for sentence in data.records("train")] == [("B-PER", "O"), ("I-PER",)]


def test_numbers_are_places_of_named_classes(model, write):
    path = write("a.jsonl", [{"tokens": ["a", "b"], "ner_tags": [2, 0]}])
    data = data_of(model, "test", test=path, label_names=["O", "B", "I"])
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [[-100, 2, 0, -100]]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"labels": ["O"]}, "column 'labels': 1 labels for 2 words; each word has one."),
        ({"labels": "O O"}, "column 'labels': the labels must be a list, one for each word, found "
                            "str 'O O'."),
        ({"labels": ["O", None]}, "column 'labels': the label of word 2 is missing."),
        ({"labels": [1.5, "O"]}, "column 'labels': the label of word 1 must be a string or an "
                                 "integer, found float 1.5."),
        ({"labels": ["O", "BB"]}, "column 'labels': label 'BB' is unknown: it is none of those "
                                  "named. Known labels: O, B. Did you mean 'B'? "
                                  "(data.label_names)"),
        ({"tokens": "a b"}, "column 'tokens': the words must be a list of strings, found str "
                            "'a b'."),
        ({"tokens": ["a", 3]}, "column 'tokens': word 2 must be a string, found int 3."),
        ({"tokens": [" ", ""]}, "column 'tokens': there are no words. Remove the row or fill it "
                                "in."),
    ],
)  # fmt: skip
def test_bad_rows_are_named(model, write, row, problem):
    good = {"tokens": ["a", "b"], "labels": ["O", "B"]}
    path = write("a.jsonl", [good, {**good, **row}])
    separator = ", "
    assert (
        message(model, test=path, label_names=["O", "B"]) == f"{path}, line 2{separator}{problem}"
    )


def test_which_column_holds_the_labels(model, write):
    path = write("a.jsonl", [{"tokens": ["a"], "pos": ["X"]}])
    assert message(model, test=path, label_names=["O", "B"]) == (
        f"{path}: the labels of words are expected in a column labels, ner_tags, tags; it has none "
        "of them. Columns found: tokens, pos. Name the one to use. (data.label_column)"
    )
    path = write("b.jsonl", [{"tokens": ["a"], "tags": ["B"], "ner_tags": ["O"]}])
    assert "it has several (ner_tags, tags)." in message(model, test=path, label_names=["O", "B"])
    options = {"label_names": ["O", "B"], "label_column": "tags"}
    batch = next(iter(data_of(model, "test", test=path, **options).test_dataloader()))
    assert batch["labels"].tolist() == [[-100, 1, -100]]
    assert message(model, test=path, tokens_column="token", **options) == (
        f"{path}, line 1: no column 'token'. Columns found: tokens, tags, ner_tags. Did you mean "
        "'tokens'? (data.tokens_column)"
    )


def test_an_empty_file(model, write):
    path = write("a.jsonl", [])
    text = message(model, test=path, label_column="labels", label_names=["O", "B"])
    assert text == f"{path}: no rows; the file is empty. (data.test)"


def test_one_class_is_no_classification(model, write):
    path = write("a.jsonl", [{"tokens": ["a", "film"], "labels": ["O", "O"]}])
    assert message(model, "fit", train=path, val=path) == (
        f"{path}: every training word has the label 'O'; classification needs at least 2. "
        "(data.label_column)"
    )


def test_a_tokenizer_that_cannot_tell_characters(model, write, monkeypatch):
    monkeypatch.setattr("transformers.TokenizersBackend.is_fast", False, raising=False)
    text = message(model, error_type=ConfigError, test=write("a.jsonl", SENTENCES), label_names=["O", "B", "I"])  # fmt: skip
    assert "does not say which characters its tokens stand for" in text
    assert text.endswith("(data.tokenizer)")


def test_labels_are_tensors_of_integers(model, write):
    path = write("a.jsonl", SENTENCES)
    data = data_of(model, "test", test=path, label_names=["O", "B", "I"])
    assert next(iter(data.test_dataloader()))["labels"].dtype == torch.int64


def test_an_empty_file_is_called_empty(model, write):
    path = write("a.jsonl", [])
    assert message(model, test=path, label_names=["B", "I"]) == (
        f"{path}: no rows; the file is empty. (data.test)"
    )


def test_half_an_emoji_names_its_word(model, write):
    path = write("a.jsonl", [{"tokens": ["a", "\ud83d"], "labels": ["B", "I"]}])
    assert message(model, test=path, label_names=["B", "I"]).startswith(
        f"{path}, line 1, column 'tokens', word 2: character 1 is '\\ud83d', half of a surrogate"
    )
