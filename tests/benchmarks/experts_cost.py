"""What LoRA on fused experts costs: without the dense sum W + delta, with it, and in peft.

    python tests/benchmarks/experts_cost.py
    python tests/benchmarks/experts_cost.py --repetitions 5 --experts 64 --tokens 1024 --device cuda

One layer of Mixtral's experts, both of its parameters adapted. A step is forward and backward to
the adapters and to the layer's input. The frozen floor is the same layer without adapters,
backward to its input only. "dense sum" is what this engine does for a module that it cannot hand
low-rank weights to: the price of not having the hold.

Time: in each repetition every variant takes one step, in an order that rotates, and is divided by
the floor's step of the same repetition; the median of these ratios is shown. Kept: the storages
that autograd keeps for backward, without parameters. Peak: the most memory that a step holds at a
time beyond what it began with.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import time
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lora_lightning import LoraConfig, inject_adapter
from lora_lightning.layers import experts as experts_host

FLOOR, OURS, DENSE, PEFT = (
    "frozen floor", "lora_lightning", "  with the dense sum", f"peft {peft.__version__}"
)  # fmt: skip
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHOSEN = 2


class Layer(nn.Module):
    """The experts alone; tokens are routed by chance."""

    def __init__(self, implementation: str, options: argparse.Namespace) -> None:
        super().__init__()
        config = transformers.MixtralConfig(
            hidden_size=options.hidden,
            intermediate_size=options.inner,
            num_local_experts=options.experts,
            num_experts_per_tok=CHOSEN,
        )
        config._experts_implementation = implementation
        self.experts = MixtralExperts(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def layers(implementation: str, dtype: torch.dtype, options: argparse.Namespace) -> dict:
    made = {}
    for name in (FLOOR, OURS, PEFT):
        torch.manual_seed(0)
        made[name] = Layer(implementation, options).to(options.device, dtype)
    made[FLOOR].requires_grad_(False)
    shared = {"r": options.rank, "target_modules": [], "target_parameters": PARAMETERS}
    inject_adapter(made[OURS], LoraConfig(init_lora_weights=False, **shared))
    config = peft.LoraConfig(init_lora_weights=False, **shared)
    made[PEFT] = peft.get_peft_model(made[PEFT], config)
    return {FLOOR: made[FLOOR], OURS: made[OURS], DENSE: made[OURS], PEFT: made[PEFT]}


@contextlib.contextmanager
def held(name: str) -> Iterator[None]:
    """For "dense sum", forget that Mixtral's experts may be handed low-rank weights."""
    known = experts_host.LOW_RANK_PACKAGES
    experts_host.LOW_RANK_PACKAGES = () if name == DENSE else known
    try:
        yield
    finally:
        experts_host.LOW_RANK_PACKAGES = known


def step(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    layer.zero_grad(set_to_none=True)
    y = layer(*inputs)
    y.backward(torch.ones_like(y))


def seconds(layer: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    step(layer, inputs)
    wait()
    return time.perf_counter() - start


def kept_bytes(layer: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(layer, inputs)
    return sum(kept.values())


def peak_bytes(layer: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    layer.zero_grad(set_to_none=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        step(layer, inputs)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def report(implementation: str, precision: str, options: argparse.Namespace) -> None:
    dtype = DTYPES[precision]
    variants = layers(implementation, dtype, options)
    # Each token of "batched_mm" gets a copy of its experts' weights: it is made for few tokens.
    tokens = min(options.tokens, 32) if implementation == "batched_mm" else options.tokens
    x = torch.randn(tokens, options.hidden, device=options.device, dtype=dtype).requires_grad_()
    index = torch.rand(tokens, options.experts, device=options.device).topk(CHOSEN).indices
    weights = torch.full((tokens, CHOSEN), 0.5, device=options.device, dtype=dtype)
    inputs = (x, index, weights)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(options.repetitions + 2):
        shift = repetition % len(variants)
        for name in [*variants][shift:] + [*variants][:shift]:
            with held(name):
                times[name].append(seconds(variants[name], inputs))
    floor = times[FLOOR][2:]
    print(
        f"\n{implementation}, {precision}, {tokens} tokens; floor {statistics.median(floor):.4f} s"
    )
    print(f"{'':22}{'time / floor':>14}{'kept MiB':>10}{'peak MiB':>10}")
    for name, layer in variants.items():
        ratio = statistics.median(t / f for t, f in zip(times[name][2:], floor, strict=True))
        with held(name):
            kept, peak = kept_bytes(layer, inputs), peak_bytes(layer, inputs)
        print(f"{name:22}{ratio:14.2f}{kept / 2**20:10.1f}{peak / 2**20:10.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for option, default in (
        ("repetitions", 9), ("experts", 16), ("hidden", 512), ("inner", 512), ("tokens", 512),
        ("rank", 8),
    ):  # fmt: skip
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=DTYPES)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()} {options.device}, {torch.get_num_threads()} threads; "
        f"{options.experts} experts of {options.hidden} x {options.inner}, r={options.rank}"
    )
    for precision in options.precisions:
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            report(implementation, precision, options)


if __name__ == "__main__":
    main()
