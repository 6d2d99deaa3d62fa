"""Labelled images from folders of classes, files that list paths, and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lightning.data.sources import hf_datasets, image_record
from lora_lightning.data.sources.image_record import ImageRecord, StoredImage
from lora_lightning.data.sources.labelled_texts import label_text
from lora_lightning.data.sources.read_rows import SPLITS, check_no_text, read_rows
from lora_lightning.data.sources.row import require_columns, with_label_names
from lora_lightning.errors import RecordError, first_few, nearest_file


def read_images(
    source: str, *, key: str, image_column: str = "image", label_column: str | None = "label"
) -> list[ImageRecord]:
    """All images of a source, in order, each with its header checked.

    Args:
        source: A folder, file or dataset, as `ImageDataModule` takes it.
        key: The config key that holds `source`, for error messages.
        image_column: The column of the image, a path or an Image of `datasets`.
        label_column: That of the label; None reads images only, also from folders without classes.

    Raises:
        RecordError: If there is no such source, or one of its images cannot be used.
    """
    check_no_text(source, key)
    path = Path(source).expanduser()
    columns = {image_column: "data.image_column"}
    if label_column is not None:
        columns[label_column] = "data.label_column"
    if path.is_dir() and not hf_datasets.is_saved_dataset(path):
        records = _of_folder(path, key, label_column is not None)
    elif path.is_dir():
        records = _of_dataset(hf_datasets.saved_dataset(path, key), source, columns)
    elif path.suffix == ".parquet" and path.is_file():
        records = _of_dataset(_parquet(path), source, columns)
    elif not path.exists() and not path.suffix and hf_datasets.is_hub_name(source):
        dataset = hf_datasets.hub_dataset(source, key, streaming=False, hint=nearest_file(path))
        records = _of_dataset(dataset, source, columns)
    else:
        records = _of_rows(path, key, columns)
    found = [image_record.checked(record) for record in records]
    if not found:
        raise RecordError(f"{source}: no images. ({key})")
    return found


def _of_folder(root: Path, key: str, labelled: bool) -> Iterator[ImageRecord]:
    suffixes = image_record.image_suffixes()
    if not labelled:
        yield from (ImageRecord(p, None, str(p)) for p in _images_below(root, suffixes))
        return
    files = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    classes = [p for p in files if p.is_dir()]
    names = [folder.name for folder in classes]
    loose = [p for p in files if p.is_file() and p.suffix.lower() in suffixes]
    if names and {name.lower() for name in names} <= SPLITS.keys():
        raise RecordError(
            f"{root}: {first_few(names)} are splits, no classes. Name each as what it is, such as "
            f"'{root / names[0]}'. ({key})"
        )
    if loose:
        raise RecordError(
            f"{loose[0]}: lies in no class's folder. Each class has a folder of its own in "
            f"{root}. ({key})"
        )
    for folder in classes:
        images = _images_below(folder, suffixes)
        if not images:
            raise RecordError(
                f"{folder}: a folder stands for a class, but this one holds no images. ({key})"
            )
        yield from (ImageRecord(path, folder.name, str(path)) for path in images)


def _images_below(folder: Path, suffixes: set[str]) -> list[Path]:
    """In order of their paths; what is hidden (macOS's `._x.jpg`, `.thumbnails/x.jpg`) is none."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    for path in files:
        image_record.check_suffix(path)
    return [path for path in files if path.suffix.lower() in suffixes]


def _of_rows(path: Path, key: str, columns: dict[str, str]) -> Iterator[ImageRecord]:
    image_column, *label_columns = columns
    for row in read_rows(str(path), key=key, columns=columns):
        where = f"{row.where}, column {image_column!r}"
        name = row.values[image_column]
        if not isinstance(name, str) or not name:
            raise RecordError(f"{where}: the path of an image is a string, found {name!r:.40}.")
        image = path.parent / Path(name).expanduser()
        if not image.is_file():
            raise RecordError(
                f"{where}: there is no file {str(image)!r}. Paths are relative to the folder of "
                f"{path.name}.{nearest_file(image)}"
            )
        label = [label_text(row.values[c], f"{row.where}, column {c!r}") for c in label_columns]
        yield ImageRecord(image, label[0] if label else None, f"{row.where}: {image}")


def _of_dataset(dataset: Any, source: str, columns: dict[str, str]) -> Iterator[ImageRecord]:
    import datasets

    image_column, *label_columns = columns
    dataset = dataset.with_format(None)  # tensors, if it was saved so
    require_columns(dataset.column_names, columns, source)
    kind = dataset.features[image_column]
    if not isinstance(kind, datasets.Image):
        raise RecordError(
            f"{source}, column {image_column!r}: holds {kind}, no images "
            "(datasets.Image). (data.image_column)"
        )
    named = with_label_names(dataset.features.to_dict())
    labels = dataset.select_columns(label_columns) if label_columns else [{}] * len(dataset)
    images = dataset.select_columns([image_column])
    images = images.cast_column(image_column, datasets.Image(decode=False))
    for number, values in enumerate(labels):
        where = f"{source}, row {number}"
        label = [label_text(v, f"{where}, column {c!r}") for c, v in named(dict(values)).items()]
        stored = StoredImage(images, image_column, number)
        yield ImageRecord(stored, label[0] if label else None, where)


def _parquet(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RecordError(
            f"{path}: reading images of a Parquet file needs the package 'datasets'. "
            'Install it with: pip install "lora_lightning[data]"'
        ) from error
    return datasets.Dataset.from_parquet(str(path))
