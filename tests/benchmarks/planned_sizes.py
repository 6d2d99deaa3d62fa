"""What LoRA on Llama-shaped models needs, by `lora-lightning plan`: one row of a table for each size.

    python tests/benchmarks/planned_sizes.py
    python tests/benchmarks/planned_sizes.py --r 8 --batch_size 2 --length 2048 --sizes 8B 70B

The sizes are those of Llama 3.1 and 3.2. Of each a `config.json` is written, and the command is given
`configs/sft.yaml` (LoRA on all Linears, bf16-true, gradient checkpointing) for a GPU; then once more with
the base in NF4. No weight is loaded or made.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from lora_lightning import Plan
from lora_lightning.cli.main import main
from lora_lightning.training.summary import readable_bytes

# Width, width of the MLP, layers, heads; 1B has one table for embeddings and head.
SIZES = {
    "1B": (2048, 8192, 16, 32),
    "8B": (4096, 14336, 32, 32),
    "70B": (8192, 28672, 80, 64),
    "405B": (16384, 53248, 126, 128),
}


def write_config(folder: Path, size: str) -> None:
    hidden, mlp, layers, heads = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": size == "1B",
    }
    (folder / "config.json").write_text(json.dumps(config))


def planned(folder: Path, asked: argparse.Namespace, *more: str) -> Plan:
    """What the command finds."""
    found: list[Plan] = []
    Plan.show = lambda plan: found.append(plan)  # type: ignore[method-assign]
    shape = ["--batch_size", str(asked.batch_size), "--length", str(asked.length)]
    model = ["--config", "sft", "--model.model", str(folder), "--lora.r", str(asked.r)]
    sys.argv = ["lora-lightning", "plan", *model, *shape, "--memory", "80GB", *more]
    main()
    return found[0]


def row(size: str, asked: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), size)
        start = time.perf_counter()
        plain = planned(Path(folder), asked)
        seconds = time.perf_counter() - start
        packed = planned(Path(folder), asked, "--model.quantize", "nf4")
    held = plain.base_bytes + plain.adapter_bytes + plain.gradient_bytes + plain.optimizer_bytes
    figures = [
        plain.base_bytes,
        plain.adapter_bytes,
        plain.optimizer_bytes,
        plain.peak_bytes - held,
        plain.peak_bytes,
        {p.name: p for p in plain.placements}["FSDP2 x 8"].peak,
        packed.peak_bytes,
    ]
    cells = [size, f"{plain.trainable / 1e6:.1f} M", *map(readable_bytes, figures)]
    return f"| {' | '.join(cells)} |   ({seconds:.0f} s)"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=[*SIZES])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    for name in options.sizes:
        print(row(name, options), flush=True)
