"""The pictures of a report in the TensorBoard of the run that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_lightning.verbs.report.figures import Picture
from lora_lightning.verbs.report.metrics import event_files
from lora_lightning.verbs.report.style import as_png


def add_pictures(folders: Sequence[Path], pictures: Sequence[Picture], step: int) -> Path | None:
    """Write the pictures into the run's newest TensorBoard folder, under `report/<name>`.

    Returns:
        The folder; None where the run has none, or tensorboard is not installed.

    """
    there = [folder for folder in folders if event_files(folder)]
    if not there:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    with SummaryWriter(str(there[-1]), filename_suffix=".report") as writer:
        for picture in pictures:
            image = _pixels(as_png(picture.figure))
            writer.add_image(f"report/{picture.name}", image, step, dataformats="HWC")
    return there[-1]


def _pixels(png: bytes) -> object:
    import io

    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png")[:, :, :3]
