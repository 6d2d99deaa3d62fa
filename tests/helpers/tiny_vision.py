"""Random vision models of a few thousand weights with their image processors, and images."""

from pathlib import Path
from typing import Any

SIZE = 16
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 70), "red": (210, 50, 40)}


def save_tiny_vision(kind: str, folder: Path, head_labels: int | None = None) -> str:
    """Write config, weights and image processor; with a trained head where `head_labels` is given.

    Args:
        kind: `vit`, `swin`, `convnext` or `resnet`.
        folder: Where they are written.
        head_labels: Classes of the head.
    """
    import torch
    import transformers as hf

    # Wider than the usual 0.02, with which so narrow a network stays mute for epochs.
    labels = {"num_labels": head_labels or 2, "initializer_range": 0.1}
    attention: dict[str, Any] = {"image_size": SIZE, "patch_size": 4, **labels}
    names, options = {
        "vit": (
            "ViT",
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, **attention},
        ),
        "swin": (
            "Swin",
            {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, **attention},
        ),
        "convnext": (
            "ConvNext",
            {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2,
             "layer_scale_init_value": 1.0, **labels},
        ),
        "resnet": (
            "ResNet",
            {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
             "layer_type": "basic", "num_labels": head_labels or 2},
        ),
    }[kind]  # fmt: skip
    config = getattr(hf, f"{names}Config")(**options)
    torch.manual_seed(0)
    suffix = "ForImageClassification" if head_labels else "Model"
    getattr(hf, f"{names}{suffix}")(config).save_pretrained(folder)
    if kind in ("vit", "swin"):
        processor = hf.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    else:  # resizes to 18 and crops
        processor = hf.ConvNextImageProcessorPil(size={"shortest_edge": SIZE})
    processor.save_pretrained(folder)
    return str(folder)


def image_of(colour: str, number: int, size: tuple[int, int] = (20, 14)) -> Any:
    """A noisy PIL image in which one colour prevails; each number gives another."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng([number, *map(ord, colour)]).normal(0, 40, (*size[::-1], 3))
    pixels = np.array(COLOURS[colour]) + noise
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def save_images(folder: Path, each: int = 12, first: int = 0) -> str:
    """A folder for each of three colours, with `each` PNG files."""
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for number in range(first, first + each):
            image_of(colour, number).save(folder / colour / f"{number:03}.png")
    return str(folder)
