"""Packages that Lightning's loggers need, and how to install them."""

from __future__ import annotations

from importlib.util import find_spec

# Of each logger: packages, any of which will do.
_NEEDED = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
    "MLFlowLogger": ("mlflow", "mlflow_skinny"),
    "CometLogger": ("comet_ml",),
}


def missing_package(class_path: str) -> str | None:
    """What a logger lacks, in a sentence with the line that installs it; None if nothing."""
    name = class_path.rpartition(".")[2]
    needed = _NEEDED.get(name, ())
    if not needed or any(map(find_spec, needed)):
        return None
    package = needed[0].replace("_", "-")
    return f"{name} needs the package {package}, which is not installed: pip install {package}"
