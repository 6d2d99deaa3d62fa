"""The quickstart's data: the docstrings of Python's own standard library."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.data.sources.labelled_texts import Record
from lora_lightning.data.text_classification import TextClassificationDataModule
from lora_lightning.data.validation_split import normalised
from lora_lightning.errors import RecordError

NUMBER_OF_PACKAGES = 12
# Shorter ones ("Return the value.") say too little to tell packages apart.
MINIMUM_CHARACTERS = 40
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class StdlibDocstrings(TextClassificationDataModule):
    """Docstrings of the standard library; the label is the package they come from.

    The 12 packages with the most docstrings are used. Sources are parsed, never imported. Which
    texts there are depends on the Python version only.

    Args:
        val: Share of the texts held out for validation, 0 <= share < 1, decided by a hash of each
            text; 0 trains without validation.
        tokenizer: Name of the tokenizer's model. Default: the LightningModule's `model_name`.
        max_length: Longer texts are cut to this many tokens; how many were cut is reported.
        batch_size: Texts per batch, each batch padded to its longest text.
        num_workers: Worker processes per data loader; 0 loads in the main process.
    """

    def __init__(
        self,
        val: float = 0.2,
        tokenizer: str | None = None,
        max_length: int = 64,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train=sysconfig.get_path("stdlib"),
            val=val,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            num_workers=num_workers,
        )

    def read(self, split: str, path: str) -> list[Record]:
        """The docstrings below `path`, the only source there is."""
        return read_docstrings(Path(path))


def read_docstrings(root: Path) -> list[Record]:
    """Docstrings of the best documented packages below `root`, labelled by package.

    Every text occurs once; one that several packages share has no right label and is left out.

    Raises:
        RecordError: If `root` holds no Python sources.
    """
    records: dict[str, Record] = {}
    packages: dict[str, set[str]] = {}
    for record in _all_docstrings(root):
        text = normalised(record.text)
        records.setdefault(text, record)
        packages.setdefault(text, set()).add(str(record.label))
    unique = [record for text, record in records.items() if len(packages[text]) == 1]
    counts = Counter(str(record.label) for record in unique)
    largest = sorted(counts, key=lambda name: (-counts[name], name))[:NUMBER_OF_PACKAGES]
    if len(largest) < 2:
        raise RecordError(
            f"{root}: found no Python sources with docstrings. This Python carries its standard "
            "library zipped or without sources; use one that has them, or bring your own data "
            "with TextClassificationDataModule."
        )
    return [record for record in unique if record.label in largest]


def _all_docstrings(root: Path) -> Iterator[Record]:
    """Docstrings of every package below `root`, in an order that depends on the sources alone."""
    for package in sorted(path.parent for path in root.glob("*/__init__.py")):
        for file in sorted(package.rglob("*.py")):
            place = file.relative_to(root)
            if SKIPPED_FOLDERS.isdisjoint(place.parts) and not place.name.startswith("."):
                for line, text in _docstrings(file):
                    yield Record(text, package.name, f"{place.as_posix()}, line {line}")


def _docstrings(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not ours: invalid escapes in others' sources
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return  # kept by Python on purpose (lib2to3's Python 2 samples), or damaged
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= MINIMUM_CHARACTERS:
                yield getattr(node, "lineno", 1), text
