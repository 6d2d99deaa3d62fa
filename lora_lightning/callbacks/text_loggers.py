"""Texts into any Lightning logger: each in its own way, or a file beside its metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lora_lightning.utilities.is_a import is_a

Row = dict[str, str]  # column -> text; all rows have the same columns


def log_texts(logger: Logger, name: str, rows: Sequence[Row], step: int) -> None:
    """Give rows of texts to a logger of Lightning; on the process that logs.

    TensorBoard, W&B, MLflow and Comet show them; any other logger that has a folder gets lines in
    its `<name>.jsonl`, such as a CSVLogger beside its `metrics.csv`.
    """
    for kind, log in _WAYS.items():
        if is_a(logger, kind):
            log(logger, name, rows, step)
            return
    folder = getattr(logger, "log_dir", None) or logger.save_dir
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with Path(folder, f"{name}.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")


def _tensorboard(logger: Any, name: str, rows: Sequence[Row], step: int) -> None:
    for number, row in enumerate(rows):
        logger.experiment.add_text(f"{name}/{number}", _markdown(row), global_step=step)


def _wandb(logger: Any, name: str, rows: Sequence[Row], step: int) -> None:
    columns = ["step", *rows[0]]
    data = [[str(step), *row.values()] for row in rows]
    logger.log_text(key=name, columns=columns, data=data)


def _mlflow(logger: Any, name: str, rows: Sequence[Row], step: int) -> None:
    text = "\n\n".join(_markdown(row) for row in rows)
    logger.experiment.log_text(logger.run_id, text, f"{name}/step_{step}.md")


def _comet(logger: Any, name: str, rows: Sequence[Row], step: int) -> None:
    for row in rows:
        logger.experiment.log_text(_markdown(row), step=step, metadata={"name": name})


def _markdown(row: Row) -> str:
    # A code block: the text as it is, whatever it holds.
    parts = []
    for column, text in row.items():
        fence = "```"
        while fence in text:
            fence += "`"
        parts.append(f"**{column}**\n\n{fence}\n{text}\n{fence}")
    return "\n\n".join(parts)


_WAYS: dict[str, Callable[[Any, str, Sequence[Row], int], None]] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
}
