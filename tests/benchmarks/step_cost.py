"""What a LoRA training step costs: this engine, peft and full fine-tuning over the frozen floor.

    python tests/benchmarks/step_cost.py
    python tests/benchmarks/step_cost.py --repetitions 5 --precisions bf16 --threads 1
    python tests/benchmarks/step_cost.py --device cuda

The frozen floor is the least a LoRA step can cost: the same model without adapters, all of it
frozen, with gradients flowing to the output of the embedding only. A step is forward, loss and
backward (no optimizer). Model: a Llama of 6 layers, hidden size 512; LoRA with r=16 on all-linear.

Time: in each repetition every variant takes one step, in an order that rotates, and is divided by
the floor's step of the same repetition; the median of these ratios is shown, and the quartiles.
One CPU thread is measured in CPU time, which other processes on the machine change least; several
threads, or a GPU, in wall time, which needs a quiet machine.
Bytes: the storages that autograd keeps for backward, each counted once, without parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from torch import Tensor, nn

import lora_lightning
from lora_lightning import LoraConfig, inject_adapter

RANK, VOCABULARY = 16, 1536
GOALS = {"fp32": (1.06, 1.0), "bf16": (1.12, 0.66), "autocast": (1.15, 0.75)}  # time, bytes
FLOOR, OURS, PEFT, FULL = "frozen floor", "lora_lightning", f"peft {peft.__version__}", "full"


def base_model(precision: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).to(device)
    return model.to(torch.bfloat16) if precision == "bf16" else model


def floor(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def ours(model: nn.Module) -> nn.Module:
    inject_adapter(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    return model


def with_peft(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return peft.get_peft_model(model, config)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    FLOOR: floor,
    OURS: ours,
    PEFT: with_peft,
    FULL: lambda model: model,
}


def loss_of(model: nn.Module, ids: Tensor, precision: str) -> Tensor:
    narrow = torch.autocast(ids.device.type, dtype=torch.bfloat16)
    with narrow if precision == "autocast" else contextlib.nullcontext():
        return model(input_ids=ids, labels=ids).loss


def step_seconds(model: nn.Module, ids: Tensor, precision: str) -> float:
    def now() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:
            return time.process_time()
        return time.perf_counter()

    model.zero_grad(set_to_none=True)
    start = now()
    loss_of(model, ids, precision).backward()
    return now() - start


def kept_bytes(model: nn.Module, ids: Tensor, precision: str) -> int:
    """Bytes of the distinct storages kept for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # itself: a copy would let go of what layers share

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, ids, precision)
    loss.backward()
    return sum(kept.values())


def measure(
    models: dict[str, nn.Module], ids: Tensor, precision: str, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of one step by variant, one for each repetition."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for repetition in range(-2, repetitions):  # the first two warm up
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = step_seconds(models[name], ids, precision)
            if repetition >= 0:
                seconds[name].append(elapsed)
    return seconds


def rows(
    seconds: dict[str, list[float]], kept: dict[str, int], precision: str
) -> list[tuple[str, ...]]:
    """Table rows: method, step over floor, its quartiles, MB kept, over peft's."""
    table = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[FLOOR], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        goal = [f" (goal {goal:g})" if name == OURS else "" for goal in GOALS[precision]]
        cells = (
            f"{precision}: {name}",
            f"{1e3 * statistics.median(own):.0f} ms",
            f"{middle:.3f}{goal[0]}",
            f"{low:.3f} .. {high:.3f}",
            f"{kept[name] / 1e6:.1f} MB",
            f"{kept[name] / kept[PEFT]:.3f}{goal[1]}",
        )
        table.append(cells)
    return table


def machine(device: str) -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((n.split(": ")[1] for n in lines if n.startswith("model name")), name)
    if device.startswith("cuda"):
        name = f"{torch.cuda.get_device_name()}, {name}"
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s); "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}, "
        f"lora_lightning {lora_lightning.__version__}"
    )


def markdown(table: list[tuple[str, ...]]) -> str:
    head = ("", "step", "step / floor", "quartiles", "kept for backward", "kept / peft")
    lines = [head, ("---", *["--:"] * 5), *table]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--precisions", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 256), metavar=("ROWS", "TOKENS"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if arguments.repetitions < 2:
        parser.error("--repetitions: quartiles need at least 2")
    torch.set_num_threads(arguments.threads)

    table: list[tuple[str, ...]] = []
    for precision in arguments.precisions:
        models = {
            name: method(base_model(precision, arguments.device))
            for name, method in METHODS.items()
        }
        ids = torch.randint(VOCABULARY, tuple(arguments.batch), device=arguments.device)
        kept = {name: kept_bytes(model, ids, precision) for name, model in models.items()}
        seconds = measure(models, ids, precision, arguments.repetitions)
        table += rows(seconds, kept, precision)
        print(f"{precision} done", flush=True)
    text = f"{machine(arguments.device)}\n\n{markdown(table)}"
    print(f"\n{text}")
    if arguments.markdown:
        arguments.markdown.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
