"""Images: where they come from, what is refused, how they become pixels, what is random."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image

from lora_lightning.data.batches.image_augmentation import Augmentation
from lora_lightning.data.images import ImageDataModule, collate_images
from lora_lightning.data.sources.image_record import ImageRecord, StoredImage, checked, load_image
from lora_lightning.data.sources.labelled_images import read_images
from lora_lightning.data.validation_split import split_records
from lora_lightning.errors import ConfigError, ModelError, RecordError
from tests.helpers.messages import message_of
from tests.helpers.tiny_vision import COLOURS, SIZE, image_of, save_images, save_tiny_vision


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_vision("vit", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), each=10)


@pytest.fixture
def own(folder, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(folder, tmp_path / "own")


def data_of(model, stage, **options):
    data = ImageDataModule(**{"image_processor": model, "batch_size": 4, **options})
    data.setup(stage)
    return data


def message(model, stage="test", error_type=RecordError, **options):
    return message_of(error_type, data_of, model, stage, **options)


def rows_of(folder):
    paths = [(f"{c}/{n:03}.png", c) for c in COLOURS for n in range(3)]
    return [{"image": path, "label": label} for path, label in paths]


# -- sources -------------------------------------------------------------------------------------


def test_folders_are_classes(model, folder):
    data = data_of(model, "fit", train=folder, val=folder)
    assert data.label_names == ["blue", "green", "red"]
    assert len(data.records("train")) == 30
    batches = list(data.val_dataloader())
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0] * 10 + [1] * 10 + [2] * 10  # fmt: skip
    assert batches[0]["pixel_values"].shape == (4, 3, SIZE, SIZE)
    assert batches[0]["pixel_values"].dtype == torch.float32


def test_pixels_are_those_of_the_processors_formula(model, folder):
    """ViT: bilinear to its size, then (x / 255 - 1/2) / (1/2)."""
    batch = next(
        iter(data_of(model, "test", test=folder, label_names=[*COLOURS]).test_dataloader())
    )
    image = image_of("blue", 0).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    truth = (torch.from_numpy(np.asarray(image, dtype=np.float64)).permute(2, 0, 1) / 255 - 0.5) / 0.5  # fmt: skip
    assert torch.allclose(batch["pixel_values"][0].double(), truth, atol=1e-6)
    assert not torch.allclose(batch["pixel_values"][1].double(), truth, atol=1e-6)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_files_of_paths(model, folder, own, kind):
    rows = rows_of(own)
    lines = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows),
        "csv": "image,label\n" + "".join(f"{row['image']},{row['label']}\n" for row in rows),
    }
    (own / f"list.{kind}").write_text(lines[kind])
    data = data_of(model, "fit", train=str(own / f"list.{kind}"), val=folder)
    assert data.label_names == ["blue", "green", "red"]
    assert [record.label for record in data.records("train")] == [row["label"] for row in rows]
    assert data.records("train")[4].image == own / "green" / "001.png"
    first = data.records("train")[0].where
    assert first.startswith(str(own / f"list.{kind}"))
    assert first.endswith(f": {own / 'blue' / '000.png'}")


def saved_dataset(path, parquet=False):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        picture=datasets.Image(), kind=datasets.ClassLabel(names=["red", "blue"])
    )
    rows = {"picture": [image_of("red", 0), image_of("blue", 1)], "kind": [0, 1]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    if parquet:
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("parquet", [False, True], ids=["saved", "parquet"])
def test_datasets_of_images(model, tmp_path, folder, parquet, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = saved_dataset(tmp_path / ("set.parquet" if parquet else "set"), parquet)
    options = {"image_column": "picture", "label_column": "kind"}
    data = data_of(model, "fit", train=path, val=path, **options)
    assert data.label_names == ["blue", "red"]
    assert [record.label for record in data.records("train")] == ["red", "blue"]
    pixels = np.asarray(load_image(data.records("train")[1]))
    assert np.array_equal(pixels, np.asarray(image_of("blue", 1)))
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == [1, 0]
    options = {**options, "image_column": "kind"}
    assert message(model, test=path, label_names=["red", "blue"], **options) == (
        f"{path}, column 'kind': holds ClassLabel(names=['red', 'blue']), no images "
        "(datasets.Image). (data.image_column)"
    )


def test_a_hub_name_is_loaded_by_datasets(model, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    local = datasets.load_from_disk(saved_dataset(tmp_path / "set"))
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return local

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = data_of(
        model, "test", test="org/pictures:test", image_column="picture", label_column="kind",
        label_names=["red", "blue"],
    )  # fmt: skip
    assert asked[0][0][0] == "org/pictures"
    assert asked[0][1]["split"] == "test"
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [0, 1]


def test_images_to_predict_need_no_classes(model, own):
    (own / "loose.png").write_bytes((own / "red" / "000.png").read_bytes())
    data = data_of(model, "predict", predict=str(own), label_names=["a", "b"])
    batches = list(data.predict_dataloader())
    where = [where for batch in batches for where in batch["where"]]
    assert where == sorted(map(str, own.rglob("*.png")))
    assert all("labels" not in batch for batch in batches)


def test_equal_files_share_a_side(model, own):
    for colour in COLOURS:
        for path in list((own / colour).iterdir()):
            shutil.copy(path, path.with_name(f"copy_{path.name}"))
    data = data_of(model, "fit", train=str(own), val=0.3)
    sides = [{r.image.read_bytes() for r in data.records(split)} for split in ("train", "val")]
    assert [len(data.records(split)) for split in ("train", "val")] == [
        2 * len(side) for side in sides
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    again = data_of(model, "fit", train=str(own), val=0.3)
    assert [r.where for r in again.records("val")] == [r.where for r in data.records("val")]


def test_the_leak_check_can_fail(model, own):
    for path in list((own / "red").iterdir()):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    records = data_of(model, "fit", train=str(own), val=0).records("train")
    by_path = split_records(records, 0.3, content=lambda record: record.where)
    sides = [{record.image.read_bytes() for record in side} for side in by_path]
    assert sides[0] & sides[1]


# -- what is refused -----------------------------------------------------------------------------


def test_a_broken_image_is_named_before_training(model, own):
    (own / "green" / "003.png").write_bytes(b"no image")
    assert message(model, "fit", train=str(own)) == (
        f"{own / 'green' / '003.png'}: the image cannot be read: is not of a known format "
        "(AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP). Replace or remove it."
    )


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_cut_off_image_is_named_when_it_is_reached(model, own, workers):
    path = own / "green" / "003.png"
    image_of("green", 3, (200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    data = data_of(model, "fit", train=str(own), val=0, num_workers=workers)
    with pytest.raises(RecordError) as error:
        list(data.train_dataloader())
    assert f"{path}: the image cannot be read: " in str(error.value)


def test_deep_pixels_are_refused(model, own):
    Image.fromarray(np.full((8, 8), 3000, dtype="uint16")).save(own / "red" / "deep.png")
    assert message(model, "fit", train=str(own)) == (
        f"{own / 'red' / 'deep.png'}: the image has pixels of more than 8 bits (mode I;16), which "
        "would be cut off at 255. Convert it to 8 bits."
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(own, mode):
    path = own / f"image.{'jpg' if mode == 'CMYK' else 'png'}"
    image_of("red", 0).convert(mode).save(path)
    image = load_image(checked(ImageRecord(path, None, "")))
    assert image.mode == "RGB"
    assert image.size == (20, 14)


def test_transparent_palettes_become_rgb(own):
    image_of("red", 0).convert("P").save(own / "p.png", transparency=bytes([0, 128]))
    assert load_image(ImageRecord(own / "p.png", None, "")).mode == "RGB"


def test_images_are_turned_as_the_camera_says(own):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image_of("red", 0).save(own / "a.jpg", exif=exif)
    assert load_image(ImageRecord(own / "a.jpg", None, "")).size == (14, 20)


def test_folders_that_hold_no_classes(model, own, tmp_path):
    (own / "a.png").write_bytes((own / "red" / "000.png").read_bytes())
    assert message(model, "fit", train=str(own)) == (
        f"{own / 'a.png'}: lies in no class's folder. Each class has a folder of its own in {own}. "
        "(data.train)"
    )
    (own / "a.png").unlink()
    (own / "empty").mkdir()
    (own / "empty" / "._001.png").write_bytes(b"of macOS")
    assert message(model, "fit", train=str(own)) == (
        f"{own / 'empty'}: a folder stands for a class, but this one holds no images. (data.train)"
    )
    root = tmp_path / "splits"
    for split in ("train", "val"):
        (root / split / "red").mkdir(parents=True)
    assert message(model, "fit", train=str(root)) == (
        f"{root}: train, val are splits, no classes. Name each as what it is, such as "
        f"'{root / 'train'}'. (data.train)"
    )
    (tmp_path / "nothing").mkdir()
    path = str(tmp_path / "nothing")
    assert message(model, "fit", train=path) == f"{path}: no images. (data.train)"


def test_wrong_paths_and_columns(model, own):
    list_file = own / "list.jsonl"
    list_file.write_text('{"image": "red/002x.png", "label": "red"}\n')
    options = {"test": str(list_file), "label_names": ["blue", "red"]}
    assert message(model, **options) == (
        f"{list_file}, line 1, column 'image': there is no file {str(own / 'red' / '002x.png')!r}. "
        "Paths are relative to the folder of list.jsonl. Did you mean "
        f"{str(own / 'red' / '002.png')!r}?"
    )
    list_file.write_text('{"image": 3, "label": "red"}\n')
    assert "the path of an image is a string, found 3." in message(model, **options)
    list_file.write_text('{"image": "red/000.png", "label": null}\n')
    assert "line 1, column 'label': the label is missing." in message(model, **options)
    list_file.write_text('{"file_name": "red/000.png", "label": "red"}\n')
    assert message(model, **options) == (
        f"{list_file}, line 1: no column 'image'. Columns found: file_name, label. "
        "(data.image_column)"
    )
    text = message(model, test=str(own / "lst.jsonl"), label_names=["blue", "red"])
    assert text == (
        f"{own / 'lst.jsonl'}: no such file. Did you mean {str(list_file)!r}? (data.test)"
    )


def test_an_unknown_class_names_the_image(model, folder, own):
    (own / "red").rename(own / "rad")
    text = message(model, "fit", train=folder, val=str(own))
    assert text == (
        f"{own / 'rad' / '000.png'}: label 'rad' is unknown: the training data have none such. "
        "Known labels: blue, green, red. Did you mean 'red'? (data.label_names)"
    )


def test_a_model_without_an_image_processor(tmp_path, folder):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    text = message(str(tmp_path), "test", ModelError, test=folder, label_names=[*COLOURS])
    assert text.startswith(f"AutoImageProcessor cannot load {str(tmp_path)!r}: ")
    assert text.endswith("(data.image_processor)")


def test_images_of_different_sizes_share_no_batch():
    with pytest.raises(ConfigError) as error:
        collate_images([{"pixel_values": torch.zeros(3, 4, 5)}, {"pixel_values": torch.zeros(3, 5, 4)}])  # fmt: skip
    assert str(error.value) == (
        "the image processor leaves images of different sizes (4 x 5, 5 x 4), which cannot share a "
        "batch. Use one that crops or resizes to one size (data.image_processor), or batches of "
        "one image (data.batch_size)."
    )


# -- what is random ------------------------------------------------------------------------------


def test_crops_keep_their_share_and_ratio():
    torch.manual_seed(0)
    crop = Augmentation(random_crop=0.25)
    boxes = torch.tensor([crop.box(400, 200) for _ in range(2000)], dtype=torch.float64)
    left, upper, right, lower = boxes.T
    assert bool((left >= 0).all() and (upper >= 0).all())
    assert bool((right <= 400).all() and (lower <= 200).all())
    wide, high = right - left, lower - upper
    share, ratio = wide * high / 80000, (wide / 400) / (high / 200)
    assert 0.24 < share.min() < 0.3
    assert 0.95 < share.max() <= 1
    # Uniform from 1/4 to 1: the mean is 5/8, the standard error 0.75 / sqrt(12 * 2000) = 0.005.
    assert share.mean() == pytest.approx(0.625, abs=0.02)
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.35
    assert ratio.log().mean().abs() < 0.02
    assert (left / (400 - wide).clamp(min=1)).mean() == pytest.approx(0.5, abs=0.03)


def test_flips_are_as_frequent_as_asked():
    torch.manual_seed(0)
    image = image_of("red", 0)
    flipped = np.asarray(image)[:, ::-1]
    augment = Augmentation(random_horizontal_flip=0.25)
    results = [np.asarray(augment(image)) for _ in range(1000)]
    flips = [np.array_equal(result, flipped) for result in results]
    assert all(f or np.array_equal(r, np.asarray(image)) for f, r in zip(flips, results, strict=True))  # fmt: skip
    assert sum(flips) / 1000 == pytest.approx(0.25, abs=0.05)


def test_only_training_images_are_changed(model, folder):
    options = {"random_horizontal_flip": 0.5, "random_crop": 0.5}
    data = data_of(model, "fit", train=folder, val=folder, **options)
    plain = data_of(model, "fit", train=folder, val=folder)
    for images, others, equal in [("val", "val", True), ("train", "val", False)]:
        first, second = data.prepared(images)[0], plain.prepared(others)[0]
        assert torch.equal(first["pixel_values"], second["pixel_values"]) is equal


def test_the_seed_decides(model, folder):
    options = {"random_horizontal_flip": 0.5, "random_crop": 0.5}
    data = data_of(model, "fit", train=folder, val=0, **options)
    pixels = []
    for seed in (1, 1, 2):
        seed_everything(seed, verbose=False)
        pixels.append(torch.cat([batch["pixel_values"] for batch in data.train_dataloader()]))
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"random_horizontal_flip": 1.5},
            "random_horizontal_flip is a probability, from 0 to 1; found 1.5. "
            "(data.random_horizontal_flip)",
        ),
        (
            {"random_crop": 0.0},
            "random_crop is the least share of the image that is kept, above 0 and at most 1; found "
            "0.0. (data.random_crop)",
        ),
    ],
)
def test_options_out_of_range(options, problem):
    with pytest.raises(ConfigError) as error:
        ImageDataModule(**options)
    assert str(error.value) == problem


def test_hidden_files_and_folders_hold_no_images(model, own):
    (own / "red" / ".thumbnails").mkdir()
    for hidden in (own / "red" / ".thumbnails" / "000.png", own / "._000.png"):
        shutil.copy(own / "red" / "000.png", hidden)
    assert len(data_of(model, "fit", train=str(own), val=str(own)).records("train")) == 30


def test_a_dataset_saved_as_tensors(own):
    datasets = pytest.importorskip("datasets", reason="dataset folders are written by datasets")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["b", "r"])
    )
    images = {"image": [str(own / "red" / "000.png")], "label": [1]}
    dataset = datasets.Dataset.from_dict(images, features=features).with_format("torch")
    dataset.save_to_disk(str(own / "saved"))
    (record,) = read_images(str(own / "saved"), key="data.train")
    assert record.label == "r"
    assert load_image(record).size == image_of("red", 0).size


@pytest.mark.parametrize("kind", ["PCX", "TGA", "ICO", "EPS"])
def test_formats_that_are_not_on_the_list(kind, own):
    image = image_of("green", 3).convert("RGB")
    path = own / "green" / "zzz.png"  # whatever it is called
    image.save(path, format=kind)
    with Image.open(path) as opened:
        assert opened.format == kind  # PIL would read it
    for read in (checked, load_image):
        assert message_of(RecordError, read, ImageRecord(path, "green", "here")) == (
            "here: the image cannot be read: is not of a known format (AVIF, BMP, GIF, JPEG, "
            "JPEG2000, PNG, PPM, TIFF, WEBP). Replace or remove it."
        )


def test_an_image_of_another_format_is_not_passed_over(own):
    image_of("green", 3).convert("RGB").save(own / "green" / "a.tga")
    (own / "green" / "notes.md").write_text("not an image")
    assert message_of(RecordError, read_images, str(own), key="data.train") == (
        f"{own / 'green' / 'a.tga'}: images of the format TGA are not read. Convert it to one of "
        "AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP, or remove it."
    )
    (own / "green" / "a.tga").unlink()
    assert len(read_images(str(own), key="data.train")) == 30


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "JPEG2000"])
def test_formats_on_the_list(kind, tmp_path):
    image = Image.linear_gradient("L").resize((40, 40)).convert("RGB")
    image.save(tmp_path / "a", format=kind)
    record = checked(ImageRecord(tmp_path / "a", "green", "here"))
    difference = np.asarray(load_image(record), int) - np.asarray(image, int)
    assert np.abs(difference).mean() < 4  # some formats lose a little


def test_a_dataset_whose_image_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    rows = [{"image": {"path": str(tmp_path / "pipe.png"), "bytes": None}}]
    for read in (checked, load_image):
        text = message_of(
            RecordError, read, ImageRecord(StoredImage(rows, "image", 0), None, "here")
        )
        assert text.startswith(
            "here: the image cannot be read: it is no ordinary file but a device"
        )
