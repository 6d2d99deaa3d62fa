import json
import logging

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden

from lora_lightning.data.batches.epoch_sampler import length_grouped
from lora_lightning.data.sources.labelled_texts import Record
from lora_lightning.data.text_classification import TextClassificationDataModule
from lora_lightning.data.validation_split import normalised, split_records
from lora_lightning.errors import ConfigError, LoraError, ModelError, RecordError
from tests.helpers.tiny_bert import save_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_bert(tmp_path_factory.mktemp("model")))


@pytest.fixture
def write(tmp_path):
    def write_file(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
        return str(path)

    return write_file


FEW = [("good film", "pos"), ("bad film", "neg"), ("the book was not very good", "neg")]
MANY = [(f"film {number}", number % 3) for number in range(60)]


def data_of(model, *stages, **options):
    data = TextClassificationDataModule(**{"tokenizer": model, "max_length": 16, **options})
    for stage in stages:
        data.setup(stage)
    return data


def message(model, stage, error_type=RecordError, **options):
    with pytest.raises(error_type) as error:
        data_of(model, stage, **options)
    assert isinstance(error.value, LoraError)
    return str(error.value)


def leaked(train, validation):
    """Texts that are on both sides, however they are written."""
    return {normalised(r.text) for r in train} & {normalised(r.text) for r in validation}


def copies_of_every_text():
    texts = [f"Film {number} was good" for number in range(200)]
    return [Record(t, "x", "") for text in texts for t in (text, text.upper(), f" {text}\n")]


def test_the_split_does_not_leak():
    train, validation = split_records(copies_of_every_text(), 0.2)
    assert len(train) + len(validation) == 600
    assert 0.1 < len(validation) / 600 < 0.3
    assert leaked(train, validation) == set()


def test_the_leak_check_can_fail():
    records = copies_of_every_text()  # split by position, as shuffling or slicing would
    assert leaked(records[::2], records[1::2])


def test_a_text_stays_on_its_side_when_the_file_changes():
    records = copies_of_every_text()
    _, validation = split_records(records, 0.2)
    _, of_fewer = split_records(records[::-2], 0.2)
    assert set(of_fewer) == set(validation) & set(records[::-2])


def test_batches_are_padded_to_their_longest_text(model, write):
    data = data_of(model, "fit", train=write("a.jsonl", FEW), batch_size=2,
                   val=0)  # fmt: skip
    assert data.label_names == ["neg", "pos"]
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [2, 1]
    for batch in batches:
        longest = batch["attention_mask"].sum(dim=1).max()
        assert batch["input_ids"].shape == (len(batch["labels"]), longest)
        assert batch["labels"].dtype == torch.int64
    assert not is_overridden("val_dataloader", data)  # Lightning then validates nothing


def test_shuffling_follows_the_global_seed(model, write):
    path = write("a.jsonl", MANY)
    orders = []
    for seed in (1, 1, 2):
        seed_everything(seed, verbose=False)
        data = data_of(model, "fit", train=path)
        orders.append(torch.cat([batch["labels"] for batch in data.train_dataloader()]).tolist())
    assert orders[0] == orders[1] != orders[2]


def padded(lengths, order, batch_size):
    """Tokens of one epoch, padding included."""
    batches = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


def test_texts_of_equal_length_share_a_batch():
    seed_everything(0, verbose=False)
    lengths = torch.randint(5, 65, (1003,)).tolist()
    order = length_grouped(lengths, batch_size=16)
    assert sorted(order) == list(range(1003))
    assert order != length_grouped(lengths, batch_size=16)
    assert padded(lengths, order, 16) < 1.1 * sum(lengths)
    assert padded(lengths, torch.randperm(1003).tolist(), 16) > 1.6 * sum(lengths)


def test_an_epoch_is_not_ordered_by_length():
    seed_everything(0, verbose=False)
    lengths = torch.randint(5, 65, (1600,)).tolist()
    order = length_grouped(lengths, batch_size=16)
    halves = [sum(lengths[index] for index in half) for half in (order[:800], order[800:])]
    assert halves[0] == pytest.approx(halves[1], rel=0.2)


def test_every_stage_reads_what_it_needs_once(model, write):
    reads = []

    class Counted(TextClassificationDataModule):
        def read(self, split, path):
            reads.append(split)
            return super().read(split, path)

    few = write("b.jsonl", [("good film", "0")])
    train = write("a.jsonl", MANY)
    data = Counted(tokenizer=model, max_length=16, train=train, test=few, predict=few)
    for _ in range(2):
        for stage in ("fit", "validate", "test", "predict"):
            data.setup(stage)
    data.setup()
    assert reads == ["train", "test", "predict"]
    assert len(data.records("train")) + len(data.records("val")) == 60
    assert "labels" in next(iter(data.test_dataloader()))
    assert "labels" not in next(iter(data.predict_dataloader()))


def test_class_ids_follow_label_names(model, write):
    path = write("a.jsonl", FEW)
    options = {"label_names": ["pos", "other", "neg"], "test": path}
    data = data_of(model, "test", **options)
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [0, 2, 2]


def test_a_number_is_the_place_of_a_named_class(model, write):
    path = write("a.jsonl", [("good film", 1), ("bad film", "0"), ("fine book", "neg")])
    data = data_of(model, "test", label_names=["neg", "pos"], test=path)
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [1, 0, 0]


@pytest.mark.parametrize("names", [["0", "2"], None])
def test_a_number_is_no_place_where_it_could_be_a_name(model, write, names):
    few = [("good film", names[0] if names else "pos"), ("bad film", names[1] if names else "neg")]
    options = {"train": write("a.jsonl", few), "val": write("b.jsonl", [("fine film", 1)])}
    assert "label '1' is unknown" in message(model, "fit", label_names=names, **options)


def test_without_training_data_the_classes_must_be_named(model, write):
    text = message(model, "test", ConfigError, test=write("a.jsonl", FEW))
    assert text == (
        "the classes are not known: give data.train, whose labels they are, or name them in "
        "order. (data.label_names)"
    )


def test_a_label_unseen_in_training(model, write):
    path = write("b.jsonl", [("fine film", "pos"), ("bad book", "negg")])
    options = {"train": write("a.jsonl", FEW), "val": path}
    assert message(model, "fit", **options) == (
        f"{path}, line 2, column 'label': label 'negg' is unknown: the training data have none "
        "such. Known labels: neg, pos. Did you mean 'neg'? (data.label_names)"
    )


def test_a_training_class_without_validation_text_is_fine(model, write):
    options = {"train": write("a.jsonl", FEW), "val": write("b.jsonl", FEW[:1])}
    assert len(data_of(model, "fit", **options).val_dataloader()) == 1


def test_a_class_whose_only_text_is_held_out_is_known(model, write):
    rare = next(
        f"book {n}" for n in range(99) if split_records([Record(f"book {n}", "", "")], 0.1)[1]
    )
    data = data_of(model, "fit", train=write("a.jsonl", [*MANY, (rare, "rare")]))
    assert data.label_names == ["0", "1", "2", "rare"]
    assert "rare" not in {record.label for record in data.records("train")}


def test_a_single_class_is_no_classification(model, write):
    path = write("a.jsonl", [("good film", "pos"), ("fine film", "pos")])
    assert message(model, "fit", train=path, val=path) == (
        f"{path}: every training text has the label 'pos'; classification needs at least 2. "
        "(data.label_column)"
    )


@pytest.mark.parametrize(
    ("stage", "split"),
    [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")],
)
def test_data_that_are_not_given(model, stage, split):
    """Known only when the loader is asked for: the user may pass one to the Trainer."""
    data = data_of(model, stage, label_names=["a", "b"])
    loader = {"fit": "train", "validate": "val"}.get(stage, stage)
    with pytest.raises(ConfigError) as error:
        getattr(data, f"{loader}_dataloader")()
    assert str(error.value) == (
        f"there is no {split} data: set data.{split} to a file or dataset folder. (data.{split})"
    )


def test_the_error_of_a_split_names_its_config_key(model, tmp_path, write):
    options = {"train": write("a.jsonl", MANY), "test": str(tmp_path / "none.jsonl")}
    assert message(model, "test", **options).endswith("(data.test)")


def test_a_fraction_that_leaves_nothing(model, write):
    path = write("a.jsonl", FEW)
    assert message(model, "fit", ConfigError, train=path, val=0.001) == (
        "val=0.001 splits the 3 training records into 3 for training and 0 for validation. Change "
        "it, or name a file. (data.val)"
    )


def test_equal_records_are_why_nothing_is_held_out(model, write):
    path = write("a.jsonl", [FEW[0]] * 20)
    found = message(model, "fit", ConfigError, train=path, val=0.5)
    assert "the 20 training records (equal ones stay together) into 20 " in found


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(ConfigError) as error:
        TextClassificationDataModule(train="a.jsonl", val=fraction)
    assert str(error.value) == (
        "val must be a file, or the share of the training data held out, at least 0 and below 1; "
        f"found {fraction}. (data.val)"
    )


def test_a_class_named_twice():
    with pytest.raises(ConfigError, match=r"twice.*data\.label_names"):
        TextClassificationDataModule(label_names=["a", "a"])


def test_cut_texts_are_counted(model, write, caplog):
    # with [CLS] and [SEP]: 4, 4 and 8 tokens
    path = write("a.jsonl", FEW)
    with caplog.at_level(logging.INFO):
        data = data_of(model, "fit", train=path, val=path, max_length=4)
        data_of(model, "predict", label_names=["a", "b"], predict=path, max_length=8)
    assert "train: 3 texts, 1 of them cut to 4 tokens (data.max_length)" in caplog.text
    assert "predict: 3 texts, 0 of them cut to 8 tokens (data.max_length)" in caplog.text
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (3, 4)


@pytest.mark.parametrize("max_length", [2, 33])
def test_max_length_beyond_the_model(model, write, max_length):
    path = write("a.jsonl", FEW)
    options = {"train": path, "val": path, "max_length": max_length}
    assert message(model, "fit", ConfigError, **options) == (
        f"max_length must be from 3 to 32, which is what {model!r} takes; found {max_length}. "
        "(data.max_length)"
    )


def test_no_tokenizer_to_be_found(write):
    path = write("a.jsonl", FEW)
    assert message(None, "fit", ConfigError, train=path, val=path) == (
        "no tokenizer is named, and there is no LightningModule with a `model_name` to take it "
        "from. (data.tokenizer)"
    )
    text = message("./nowhere", "fit", ModelError, train=path, val=path)
    assert text.endswith("(data.tokenizer)")


def test_a_tokenizer_without_padding(tmp_path, write):
    folder = save_tiny_bert(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    path = write("a.jsonl", FEW)
    assert message(str(folder), "fit", ConfigError, train=path, val=path) == (
        f"the tokenizer of {str(folder)!r} has no padding token, so its texts cannot share a "
        "batch; name one that has. (data.tokenizer)"
    )


def test_a_label_that_is_none_of_those_named(model, write):
    options = {"train": write("a.jsonl", FEW), "val": 0, "label_names": ["good", "neg"]}
    assert "label 'pos' is unknown: it is none of those named. Known labels: good, neg." in message(
        model, "fit", **options
    )


def test_half_an_emoji_names_its_place(model, write):
    path = write("a.jsonl", [*FEW, ("bad \ud83d", "neg")])
    assert message(model, "fit", train=path, val=0).startswith(
        f"{path}, line 4, column 'text': character 5 is '\\ud83d', half of a surrogate pair."
    )


@pytest.mark.parametrize(("name", "number"), [("batch_size", 0), ("num_workers", -1)])
def test_numbers_that_make_no_loader(name, number):
    with pytest.raises(
        ConfigError, match=rf"{name} must be at least .*{number}\. \(data\.{name}\)"
    ):
        TextClassificationDataModule("a.jsonl", **{name: number})
