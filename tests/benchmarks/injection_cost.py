"""What it costs to put adapters on a large model: ours over peft's, in one process.

    python tests/benchmarks/injection_cost.py

An 80-layer, 8192-wide Llama on the meta device (560 Linears), LoRA r=16 on all of them; medians of
paired ratios. A second adapter is compared with the first one of the same library.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import peft
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lightning
from lora_lightning import LoraConfig, inject_adapter


def llama(layers: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    first, second, second_of_peft, ratio_second = [], [], [], []
    for _ in range(options.repetitions):
        ours, theirs = llama(options.layers), llama(options.layers)
        config = peft.LoraConfig(r=16, target_modules="all-linear")
        box: list[peft.PeftModel] = []
        peft_first = seconds(lambda: box.append(peft.get_peft_model(theirs, config)))  # noqa: B023
        our_first = seconds(lambda: inject_adapter(ours, LoraConfig(r=16)))  # noqa: B023
        again = peft.LoraConfig(r=16, target_modules="all-linear")
        peft_second = seconds(lambda: box[0].add_adapter("second", again))  # noqa: B023
        our_second = seconds(lambda: inject_adapter(ours, LoraConfig(r=16), "second"))  # noqa: B023
        first.append(our_first / peft_first)
        second.append(our_second / peft_second)
        ratio_second.append(our_second / our_first)
        second_of_peft.append(peft_second / peft_first)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}, lora_lightning "
        f"{lora_lightning.__version__}"
    )
    print(f"{options.layers * 7} Linears on meta, r=16, medians of {options.repetitions} ratios:")
    print(f"  first adapter, ours / peft      {statistics.median(first):.3f}   (goal <= 0.25)")
    print(f"  second adapter, ours / peft     {statistics.median(second):.3f}")
    print(f"  second / first, ours            {statistics.median(ratio_second):.2f}   (goal <= 1)")
    print(f"  second / first, peft            {statistics.median(second_of_peft):.2f}")


if __name__ == "__main__":
    main()
