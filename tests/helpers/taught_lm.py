"""Tiny language models that are taught one answer by heart, and runs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_lightning import CausalLM, LoraCallback, TextDataModule
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.tiny_lm import tiny_llama, tiny_tokenizer

QUESTION, ANSWER = "What is the capital of France?", "Paris is the capital."
CHAT = {
    "messages": [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
}
# An end of sequence that no turn ends with, as in the bases of Qwen2.5.
OTHER_EOS = {"chatml": "<|endoftext|>", "llama3": "<|end_of_text|>", "gemma": "<eos>"}
TURN_ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


def base_with_other_eos(folder: Path, style: str, **config: Any) -> Path:
    """A Llama whose turns end with another token than its texts."""
    eos = OTHER_EOS[style]
    tokenizer = tiny_tokenizer(style)
    tokenizer.eos_token = eos
    tiny_llama(folder, style, eos_token_id=tokenizer.eos_token_id, **config)
    tokenizer.save_pretrained(folder)
    return folder


def taught(
    folder: Path,
    base: Path,
    rows: Any = CHAT,
    steps: int = 40,
    task: Any = CausalLM,
    name: str = "run",
    **data: Any,
) -> Path:
    """Train an adapter on `rows` (one: eight times the same); the run directory in `folder`."""
    rows = [rows] * 8 if isinstance(rows, dict) else rows
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / name
    torch.manual_seed(0)
    trainer = make_trainer(
        run,
        LoraCallback(r=8),
        ModelCheckpoint(run / "checkpoints"),
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        limit_val_batches=0,
    )
    module = task(str(base), learning_rate=2e-2, max_new_tokens=24)
    module_data = TextDataModule(str(file), val=0, batch_size=8, **{"max_length": 64, **data})
    trainer.fit(module, module_data)
    return run
