"""Tasks under ModelParallelStrategy (FSDP2) on two gloo processes: the same as on one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_lightning import LoraCallback
from lora_lightning.errors import LoraError
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.tasks import CausalLM, SequenceClassification, network
from lora_lightning.tasks.sharding import repeated_layers
from lora_lightning.utilities.constants import IGNORE_INDEX
from lora_lightning.utilities.dtensor import full_tensor, is_sharded
from tests.helpers.fsdp1_on_cpu import OnCpu
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_lm import tiny_llama

CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "adapters": ("tied", True, {}),
    "all": ("tied", False, {}),
    "untied": ("untied", False, {}),
    "checkpointed": ("tied", True, {"gradient_checkpointing": True}),
    "compiled": ("untied", False, {"compile": {"backend": "eager"}}),
}


def fit(
    folder: Path, model: str, lora: bool, devices: int, strategy: Any = None, **options: Any
) -> dict[str, Tensor]:
    """What is trained, whole, after three steps of 4 rows in all with unequal prompts."""
    seed_everything(7, verbose=False)
    torch._dynamo.reset()
    ids = torch.randint(0, 200, (12, 10), generator=torch.Generator().manual_seed(3))
    prompt = torch.arange(10) < torch.arange(12)[:, None] % 7
    labels = ids.masked_fill(prompt, IGNORE_INDEX)
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    own = list(range(int(os.environ.get("RANK", 0)), 12, devices))
    loader = DataLoader(rows, 4 // devices, sampler=own)
    callbacks = [LoraCallback(r=2)] if lora else []
    way = strategy or ("auto" if devices == 1 else ModelParallelStrategy(2, 1))
    trainer = make_trainer(
        folder, *callbacks, devices=devices, strategy=way, use_distributed_sampler=False
    )
    # SGD: Adam makes a step of full length of a gradient that is 0 but for rounding.
    module = CausalLM(str(folder.parent / model), **options)
    module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [p for p in module.parameters() if p.requires_grad], lr=0.1
    )
    trainer.fit(module, loader)
    fsdp2 = devices == 2 and strategy is None
    assert all(is_sharded(p) for p in module.parameters()) == fsdp2
    return {
        n: full_tensor(p).detach().clone() for n, p in named_parameters(module) if p.requires_grad
    }


def on_two(folder: Path) -> dict[str, Any]:
    found = {
        name: fit(folder / name, model, lora, 2, **options)
        for name, (model, lora, options) in CASES.items()
    }
    found["fsdp1"] = fit(
        folder / "fsdp1",
        "untied",
        True,
        2,
        OnCpu(auto_wrap_policy={LlamaDecoderLayer}),
        gradient_checkpointing=True,
    )
    return {
        "runs": found,
        "head": new_head(folder),
        "loads": loads(folder),
        "texts": texts(folder, 2),
        "refusals": refusals(folder),
    }


def new_head(folder: Path) -> dict[str, Any]:
    """A head that no file has, which starts the same everywhere."""
    module = SequenceClassification(str(folder / "bert"), label_names=["a", "b", "c"])
    lora = LoraCallback(r=2, modules_to_save=["classifier"])
    trainer = make_trainer(folder / "head", lora, devices=2, strategy=ModelParallelStrategy(2, 1))
    rows = [{"input_ids": torch.arange(4, 8), "labels": torch.tensor(label)} for label in range(3)]
    trainer.fit(module, DataLoader(rows, 1))
    weight = full_tensor(module.network.classifier.weight).detach()
    return {"new": sorted(module.new_parameters), "weight": weight, "rates": len(rates(trainer))}


def texts(folder: Path, devices: int) -> list[str]:
    """What is written for two prompts, of which one soon ends."""
    seed_everything(7, verbose=False)
    way = "auto" if devices == 1 else ModelParallelStrategy(2, 1)
    prompts = [{"input_ids": torch.arange(place, place + 5)} for place in (20, 57)]
    options = {"max_new_tokens": 9, "generation": {"eos_token_id": 5}}
    module = CausalLM(str(folder / "untied"), **options)
    trainer = make_trainer(folder / "texts", devices=devices, strategy=way)
    written = trainer.predict(module, DataLoader(prompts, 1))
    return [text for batch in written or [] for text in batch]


def rates(trainer: Any) -> list[float]:
    return [group["lr"] for group in trainer.optimizers[0].param_groups]


def loads(folder: Path) -> int:
    """How often this process read the model's files."""
    calls = []
    original = network.load_pretrained

    def counted(auto_class: str, *args: Any, **options: Any) -> Any:
        calls.extend([1] if auto_class != "AutoConfig" else [])
        return original(auto_class, *args, **options)

    network.load_pretrained = counted
    fit(folder / "loads", "tied", True, 2)
    network.load_pretrained = original
    return len(calls)


def refusals(folder: Path) -> dict[str, str]:
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    shutil.copy(folder / "tied/config.json", empty)  # and no weights
    errors = {}
    compiled = {"compile": True}
    attempts: dict[str, Any] = {
        "no weights": (str(empty), {}, ModelParallelStrategy(2, 1)),
        "quantised": (str(folder / "tied"), {"quantize": "nf4"}, ModelParallelStrategy(2, 1)),
        "compiled": (str(folder / "tied"), compiled, ModelParallelStrategy(2, 1)),
        "tensor parallel": (str(folder / "tied"), {}, ModelParallelStrategy()),
    }
    for name, (model, options, strategy) in attempts.items():
        trainer, module = (
            make_trainer(folder, devices=2, strategy=strategy),
            CausalLM(model, **options),
        )
        trainer.callbacks += [LoraCallback(r=2)] if name == "compiled" else []
        with pytest.raises(LoraError) as error:
            trainer.fit(module, DataLoader([0, 1]))
        errors[name] = str(error.value)
    return errors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_llama(folder / "tied", tie_word_embeddings=True)
    tiny_llama(folder / "untied")
    save_tiny_bert(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def found(place: Path) -> list[dict[str, Any]]:
    return on_processes(2, on_two, place)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "fsdp1"])
def test_two_processes_are_one(place: Path, found: Any, name: str) -> None:
    model, lora, options = CASES.get(name, ("untied", True, {"gradient_checkpointing": True}))
    alone = fit(place / f"{name} alone", model, lora, 1, **options)
    for rank in found:
        there = rank["runs"][name]
        assert there.keys() == alone.keys()
        assert len(there) == (28 if lora else 20 if model == "tied" else 21)
        for key, tensor in alone.items():
            assert torch.allclose(there[key], tensor, atol=1e-6), key


@pytest.mark.slow
def test_negative_control_one_process_with_half_of_the_rows(
    place: Path, found: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RANK", "1")  # every row but the first
    with pytest.raises(AssertionError):
        test_two_processes_are_one(place, found, "all")


@pytest.mark.slow
def test_a_new_head_starts_from_rank_0(found: Any) -> None:
    first, second = (rank["head"] for rank in found)
    assert first["new"] == ["network.classifier.bias", "network.classifier.weight"]
    assert first["new"] == second["new"]
    assert first["rates"] == second["rates"] == 2
    assert torch.equal(first["weight"], second["weight"])


@pytest.mark.slow
def test_one_process_alone_reads_the_files(found: Any) -> None:
    assert [rank["loads"] for rank in found] == [1, 0]


@pytest.mark.slow
def test_texts_are_written_together(place: Path, found: Any) -> None:
    alone = texts(place, 1)
    assert [text.endswith("$") for text in alone] == [False, True]  # token 5
    assert [rank["texts"][0] for rank in found] == alone


@pytest.mark.slow
def test_every_process_says_what_is_wrong(found: Any, place: Path) -> None:
    first, second = (rank["refusals"] for rank in found)
    assert first == second
    assert first["no weights"].startswith(
        f"AutoModelForCausalLM cannot load {str(place / 'empty')!r}: "
    )
    assert first["quantised"] == (
        "quantize='nf4' packs weights into integers, which FSDP cannot share out. Each process "
        "holds all of them with strategy='ddp'. (model.quantize, trainer.strategy)"
    )
    assert first["compiled"] == (
        "compile cannot be had of layers that are shared out and carry adapters: these are "
        "gathered one by one, and no graph would be left of a layer. Take one of the two out. "
        "(model.compile, trainer.strategy)"
    )
    assert first["tensor parallel"].startswith(
        "ModelParallelStrategy was given (or has chosen, as tensor_parallel_size is 'auto') "
        "tensor_parallel_size=2, and tasks are shared out by FSDP alone."
    )


def test_layers_are_found(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "vocab_size": 8}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, num_layers=2, num_decoder_layers=3))
    assert [type(layer).__name__ for layer in repeated_layers(t5)] == ["T5Block"] * 5
