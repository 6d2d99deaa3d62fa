"""LoRA, head only and full fine-tuning side by side, with the settings of configs/quickstart.yaml.

    python tests/benchmarks/quickstart_methods.py --seeds 0 1 2

Everything but the method is the same: data, epochs, batch size, schedule, clipping, seeds. The
learning rate of full fine-tuning is the best of several on the first seed, so that it competes at
its best; the other methods take theirs from the config. About 1 min per run on one CPU core.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import lightning as L
import torch
import transformers
import yaml

from lora_lightning import LoraCallback, SequenceClassification, StdlibDocstrings

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@dataclass
class Run:
    """What one training run left behind; sizes in bytes, time in seconds."""

    accuracy: float
    trainable: int
    cpu_seconds: float
    with_optimizer: int
    weights_only: int


class HeadOnly(SequenceClassification):
    """The quickstart's task with a frozen encoder."""

    def configure_model(self) -> None:
        """Build the network, then freeze all but the new head."""
        super().configure_model()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.new_parameters)


def train(
    config: dict[str, Any],
    seed: int,
    task: Callable[..., SequenceClassification],
    callbacks: Callable[[], list[L.Callback]],
) -> Run:
    """One run from the pretrained base to the end of the schedule."""
    L.seed_everything(seed, verbose=False)
    module, data = task(), StdlibDocstrings(**config["data"]["init_args"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=config["trainer"]["max_epochs"],
            gradient_clip_val=config["trainer"]["gradient_clip_val"],
            default_root_dir=folder,
            callbacks=callbacks(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # CPU time, because other processes on the machine do not change it.
        start = time.process_time()
        trainer.fit(module, data)
        seconds = time.process_time() - start
        sizes = []
        for weights_only in (False, True):
            path = Path(folder) / "run.ckpt"
            trainer.save_checkpoint(path, weights_only=weights_only)
            sizes.append(path.stat().st_size)
        accuracy = trainer.validate(module, data, verbose=False)[0]["val_accuracy"]
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Run(accuracy, trainable, seconds, *sizes)


def row(name: str, runs: list[Run], reference: list[Run]) -> str:
    """One line of the table; `reference` is what time is relative to."""
    each = ", ".join(f"{run.accuracy:.3f}" for run in runs)
    mean = statistics.mean(run.accuracy for run in runs)
    time_ratio = sum(r.cpu_seconds for r in runs) / sum(r.cpu_seconds for r in reference)
    sizes = [f"{size / 1e6:.1f} MB" for size in (runs[0].with_optimizer, runs[0].weights_only)]
    cells = [
        name,
        f"{runs[0].trainable:,}",
        f"**{mean:.3f}** ({each})",
        *sizes,
        f"{time_ratio:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--full_lrs", type=float, nargs="+", default=[1e-4, 3e-4, 5e-4])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")

    config = yaml.safe_load(CONFIG.read_text())
    settings = config["model"]["init_args"]
    lora = partial(LoraCallback, **config["lora"])
    methods: dict[
        str, tuple[Callable[..., SequenceClassification], Callable[[], list[L.Callback]]]
    ] = {
        f"LoRA, r={config['lora']['r']}": (
            partial(SequenceClassification, **settings),
            lambda: [lora()],
        ),
        "head only": (partial(HeadOnly, **settings), list),
    }
    full = {
        lr: (partial(SequenceClassification, **{**settings, "learning_rate": lr}), list)
        for lr in arguments.full_lrs
    }

    def report(name: str, seed: int, run: Run) -> Run:
        print(f"{name}, seed {seed}: {run.accuracy:.3f}, {run.cpu_seconds:.0f} s CPU", flush=True)
        return run

    first = arguments.seeds[0]
    tried = {
        lr: report(f"full, lr {lr:g}", first, train(config, first, *method))
        for lr, method in full.items()
    }
    best = max(tried, key=lambda lr: tried[lr].accuracy)
    name_of_full = f"full fine-tuning, lr {best:g}"
    results: dict[str, list[Run]] = {name: [] for name in methods}
    results[name_of_full] = [tried[best]]
    for seed in arguments.seeds:
        for name, method in methods.items():
            results[name].append(report(name, seed, train(config, seed, *method)))
        if seed != first:
            run = train(config, seed, *full[best])
            results[name_of_full].append(report(name_of_full, seed, run))

    print(
        f"\nPython {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, lightning {L.__version__}, "
        f"{torch.get_num_threads()} thread(s); seeds {arguments.seeds}; full fine-tuning at other "
        f"learning rates, seed {first}: "
        + ", ".join(f"{lr:g}: {run.accuracy:.3f}" for lr, run in tried.items())
        + "\n\n| method | trainable | validation accuracy: mean (each seed) | checkpoint "
        "| without optimizer state | time / full |\n|---|--:|--:|--:|--:|--:|"
    )
    for name, runs in results.items():
        print(row(name, runs, results[name_of_full]))


if __name__ == "__main__":
    main()
