"""How an exported folder is used: for the model card, and for the last lines of the command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.verbs.export.diffusers import FILE

# Of PEFT's task types: the class of transformers, and that of PEFT, by which a model is loaded.
AUTO_CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


@dataclass(frozen=True)
class Use:
    """Attributes: the folder or repository, its format, the base's name, its config, the class of
    the model that it is for.
    """

    name: str
    form: str
    base: str
    options: Mapping[str, Any]
    kind: str


@dataclass(frozen=True)
class Way:
    """Attributes: with what; the language of the text; the text."""

    title: str
    language: str
    text: str


def ways_to_use(use: Use) -> list[Way]:
    """All of them, the most usual one first."""
    return [*_ways(use)]


def _ways(use: Use) -> Iterator[Way]:
    if use.form == "diffusers":
        yield Way(
            "diffusers",
            "python",
            "from diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({use.base!r})\n"
            f'pipeline.load_lora_weights({use.name!r}, weight_name="{FILE}")',
        )
        return
    own = use.options.get("base_model_name_or_path") is None
    peft_has_it = not str(use.options.get("peft_type")).startswith("LORA_LIGHTNING")
    task = use.options.get("task_type")
    if use.form == "portable" and task == "CAUSAL_LM":
        r = use.options["r"]
        rank = next((rank for rank in _RANKS if rank >= r), r)
        yield Way(
            "vLLM",
            "bash",
            f"vllm serve {use.base} \\\n    --enable-lora --max-lora-rank {rank} \\\n"
            f"    --lora-modules adapter={use.name}",
        )
        yield Way(
            "llama.cpp", "bash", f"python convert_lora_to_gguf.py {use.name} --base {use.base}"
        )
    if peft_has_it and not own:
        if task in AUTO_CLASSES:
            auto = AUTO_CLASSES[task]
            yield Way(
                "peft",
                "python",
                f"from peft import AutoPeftModel{auto}\n\n"
                f"model = AutoPeftModel{auto}.from_pretrained({use.name!r})",
            )
            yield Way(
                "transformers",
                "python",
                f"from transformers import AutoModel{auto}\n\n"
                f"model = AutoModel{auto}.from_pretrained({use.base!r})\n"
                f"model.load_adapter({use.name!r})",
            )
        else:
            yield Way(
                "peft",
                "python",
                "from peft import PeftModel\n\n"
                f"model = PeftModel.from_pretrained(base, {use.name!r})  # base: its {use.kind}",
            )
    yield Way(
        "lora_lightning",
        "python",
        "from lora_lightning import load_adapter\n\n"
        f"load_adapter(model, {use.name!r})  # model: the {use.kind} as it was before training",
    )
