"""One image, wherever it is stored: found whole before training, decoded when it is needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_lightning.errors import RecordError

if TYPE_CHECKING:
    from PIL.Image import Image

# Enough of a file to tell it from others: its size counts as well.
FINGERPRINT_BYTES = 65536
# PIL's names of what is read. Of its other decoders some are old and little used, and one starts
# another program (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Pixels of more than 8 bits, which PIL cuts off at 255 where they become RGB.
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


@dataclass(frozen=True)
class StoredImage:
    """Row `row` of a Hugging Face dataset whose `column` is an undecoded Image."""

    dataset: Any
    column: str
    row: int


@dataclass(frozen=True)
class ImageRecord:
    """An image, its label (None where none was asked for) and where both were found.

    Attributes:
        content: Equal for images of equal bytes; known once it was `checked`.
    """

    image: Path | StoredImage
    label: str | None
    where: str
    content: str = ""

    def open(self) -> IO[bytes]:
        """The bytes of the image's file."""
        if isinstance(self.image, Path):
            return _opened(self.image)
        stored = self.image.dataset[self.image.row][self.image.column]
        if stored is None:
            raise OSError("there is no image in this row")
        if stored["bytes"] is None:
            return _opened(Path(stored["path"]))
        return BytesIO(stored["bytes"])


def checked(record: ImageRecord) -> ImageRecord:
    """`record` with its `content`, when its header is that of an image we can use.

    Reads the first 64 KiB, not the pixels.

    Raises:
        RecordError: If there is no image, or one of more than 8 bits per channel.
    """
    with _named(record), record.open() as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.sha256(file.read(FINGERPRINT_BYTES)).hexdigest()
        file.seek(0)
        image = _decoder(file)
        if image.mode in DEEP_MODES:
            raise RecordError(
                f"{record.where}: the image has pixels of more than 8 bits (mode {image.mode}), "
                "which would be cut off at 255. Convert it to 8 bits."
            )
    return replace(record, content=f"{size} {digest}")


def image_size(record: ImageRecord) -> tuple[int, int]:
    """Width and height as its header says them.

    Raises:
        RecordError: If there is no image.
    """
    with _named(record), record.open() as file:
        width, height = _decoder(file).size
        return width, height


def load_image(record: ImageRecord) -> Image:
    """The image as a PIL image in RGB, turned as its EXIF data say.

    Raises:
        RecordError: If the image is damaged.
    """
    from PIL import ImageOps

    with _named(record), record.open() as file:
        image = ImageOps.exif_transpose(_decoder(file))
        if "transparency" in image.info:  # of a palette: PIL warns where it is dropped at once
            image = image.convert("RGBA")
        return image.convert("RGB")


@contextmanager
def _named(record: ImageRecord) -> Iterator[None]:
    """Says of an image that cannot be read which it is."""
    bomb = _pil().DecompressionBombError
    try:
        yield
    except RecordError:
        raise
    except (OSError, SyntaxError, ValueError, bomb) as error:  # all that PIL raises on bad files
        reason = f"{error}"
        if "cannot identify" in reason:
            reason = f"is not of a known format ({', '.join(FORMATS)})"
        raise RecordError(
            f"{record.where}: the image cannot be read: {reason}. Replace or remove it."
        ) from error


def _opened(path: Path) -> IO[bytes]:
    if path.exists() and not path.is_file():
        raise OSError("it is no ordinary file but a device, a pipe or a folder")
    return path.open("rb")


def _decoder(file: IO[bytes]) -> Any:
    pil = _pil()
    pil.init()
    return pil.open(file, formats=[kind for kind in FORMATS if kind in pil.OPEN])


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise RecordError(
            "reading images needs the package 'pillow'. "
            'Install it with: pip install "lora_lightning[data]"'
        ) from error
    return Image


def image_suffixes() -> set[str]:
    """Suffixes of the files that are read, such as `.png`."""
    return {suffix for suffix, kind in _suffixes().items() if kind in FORMATS}


def check_suffix(path: Path) -> None:
    """Refuse an image that would be passed over: of another format that PIL knows."""
    kind = _suffixes().get(path.suffix.lower())
    if kind is not None and kind not in FORMATS:
        raise RecordError(
            f"{path}: images of the format {kind} are not read. Convert it to one of "
            f"{', '.join(FORMATS)}, or remove it."
        )


def _suffixes() -> dict[str, str]:
    pil = _pil()
    pil.init()
    return {
        suffix: kind for suffix, kind in pil.registered_extensions().items() if kind in pil.OPEN
    }
