"""What options of tasks save and cost: bytes of the base and kept for backward, CPU time of a step.

A Llama of 6 layers (hidden 512, vocabulary 4,000), 4 x 256 tokens, r=16 on all Linears, CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/option_cost.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from lora_lightning import LoraConfig, inject_adapter
from lora_lightning.tasks import CausalLM
from tests.helpers.tiny_lm import tiny_llama

SIZES = {
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float32, gradient_checkpointing": {"gradient_checkpointing": True},
    "bfloat16, gradient_checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "bfloat16, nf4": {"dtype": "bfloat16", "quantize": "nf4"},
    "bfloat16, nf4, gradient_checkpointing": {
        "dtype": "bfloat16",
        "quantize": "nf4",
        "gradient_checkpointing": True,
    },
}


def measured(folder: str, options: dict[str, Any]) -> tuple[float, float, float]:
    """MB of the base, MB kept for backward, median CPU seconds of a step."""
    task = CausalLM(folder, **options)
    task.configure_model()
    base = sum(p.untyped_storage().nbytes() for p in task.parameters())
    inject_adapter(task, LoraConfig(r=16))
    weights = {p.untyped_storage().data_ptr() for p in task.parameters()}
    ids = torch.randint(0, 4000, (4, 256), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.training_step(batch, 0)
    loss.backward()
    times = []
    for _ in range(5):
        start = time.process_time()
        task.training_step(batch, 0).backward()
        times.append(time.process_time() - start)
    return base / 1e6, sum(kept.values()) / 1e6, statistics.median(times)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    table = Table("options", "base, MB", "kept for backward, MB", "step, CPU s")
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(Path(folder), **SIZES)
        for name, options in OPTIONS.items():
            base, kept, seconds = measured(folder, options)
            table.add_row(name, f"{base:.0f}", f"{kept:.0f}", f"{seconds:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
