"""CausalLM and Seq2SeqLM: trained, evaluated and asked, through the Trainer and without it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_lightning import CausalLM, LoraCallback, Seq2SeqLM
from lora_lightning.errors import ConfigError, ModelError, RecordError
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.utilities.constants import IGNORE_INDEX
from lora_lightning.utilities.dtensor import full_tensor
from lora_lightning.utilities.wrappers import plain_name
from tests.helpers.causal_lm_with_sgd import MeanOfMeans, WithSGD
from tests.helpers.fsdp1_on_cpu import on_cpu
from tests.helpers.fsdp2_modules import fully_sharded
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.resumable_run import ResumableRun
from tests.helpers.tiny_lm import tiny_llama, tiny_tokenizer

LENGTHS = (9, 4, 12, 7, 5, 12, 3, 8)
PROMPT = 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: Any) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: Any) -> str:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = T5Config(vocab_size=len(tokenizer), **sizes, **ids, dropout_rate=0.0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(10, 300, (n,), generator=generator).tolist() for n in LENGTHS]


def padded(rows: list[list[int]], filling: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filling] * (longest - len(row)) for row in rows])


def causal(rows: list[list[int]]) -> dict[str, Tensor]:
    labels = [[IGNORE_INDEX] * PROMPT + row[PROMPT:] for row in rows]
    mask = padded([[1] * len(row) for row in rows], 0)
    return {
        "input_ids": padded(rows, 0),
        "attention_mask": mask,
        "labels": padded(labels, IGNORE_INDEX),
    }


def seq2seq(rows: list[list[int]]) -> dict[str, Tensor]:
    inputs, targets = [row[:3] for row in rows], [row[2:] for row in rows]
    return {"input_ids": padded(inputs, 0), "attention_mask": torch.ones(len(rows), 3), "labels": padded(targets, IGNORE_INDEX)}  # fmt: skip


KINDS: dict[str, Any] = {"causal": (CausalLM, causal), "seq2seq": (Seq2SeqLM, seq2seq)}


@pytest.fixture
def task(request: Any) -> tuple[Any, str, Any]:
    kind, collate = KINDS[request.param]
    return kind, request.getfixturevalue("llama" if kind is CausalLM else "t5"), collate


both = pytest.mark.parametrize("task", KINDS, indirect=True)


def loader(collate: Any, batch_size: int = 2, rows: Any = None) -> DataLoader:
    return DataLoader(rows or texts(), batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def scores_and_labels(module: Any, collate: Any) -> tuple[Tensor, Tensor]:
    """Of all learned tokens, by plain transformers, in float64."""
    network = module.network.double().eval()
    batch = collate(texts())
    with torch.no_grad():
        scores = network(**batch).logits
    labels = batch["labels"]
    if not network.config.is_encoder_decoder:
        scores, labels = scores[:, :-1], labels[:, 1:]
    return scores[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]


@pytest.mark.slow
@both
def test_it_learns_and_logs(tmp_path: Path, task: Any) -> None:
    kind, model, collate = task
    seed_everything(0, verbose=False)
    module = kind(model, learning_rate=1e-2)
    trainer = make_trainer(tmp_path, LoraCallback(r=8), max_epochs=25)
    trainer.fit(module, loader(collate), loader(collate))
    logged = trainer.callback_metrics
    assert {"train_loss", "val_loss", "val_perplexity", "val_accuracy"} <= set(logged)
    assert logged["val_loss"] < 4  # about 6 at the beginning; small frozen heads cannot be sure
    assert logged["val_accuracy"] > 0.5


@both
@pytest.mark.parametrize("batch_size", [1, 3])
def test_metrics_are_those_of_all_tokens(tmp_path: Path, task: Any, batch_size: int) -> None:
    kind, model, collate = task
    module = kind(model)
    trainer = make_trainer(tmp_path)
    for stage, evaluate in (("val", trainer.validate), ("test", trainer.test)):
        [logged] = evaluate(module, loader(collate, batch_size), verbose=False)
        scores, labels = scores_and_labels(module, collate)
        truth = float(cross_entropy(scores, labels))
        accuracy = float((scores.argmax(-1) == labels).double().mean())
        assert logged[f"{stage}_loss"] == pytest.approx(truth, rel=1e-6)
        assert logged[f"{stage}_perplexity"] == pytest.approx(math.exp(truth), rel=1e-5)
        assert logged[f"{stage}_accuracy"] == pytest.approx(accuracy, rel=1e-6)
        module.network.float()


@both
def test_steps_work_without_a_trainer(task: Any) -> None:
    kind, model, collate = task
    module = kind(model)
    module.configure_model()
    module.network.eval()
    batch = collate(texts())
    loss = module.training_step(batch, 0).detach()
    scores, labels = scores_and_labels(module, collate)
    assert float(loss) == pytest.approx(float(cross_entropy(scores, labels)), rel=1e-6)


def test_a_batch_without_labels(llama: str) -> None:
    module = CausalLM(llama)
    module.configure_model()
    with pytest.raises(
        RecordError, match=r"`input_ids` and `labels`.*found one with \['input_ids'\]"
    ):
        module.training_step({"input_ids": torch.ones(1, 3, dtype=torch.long)}, 0)


# -- exactness -------------------------------------------------------------------------------------


def adapters(module: Any) -> dict[str, Tensor]:
    return {
        n: full_tensor(p).detach().clone() for n, p in named_parameters(module) if p.requires_grad
    }


def trained(folder: Path, kind: Any, model: str, batch_size: int, **options: Any) -> Any:
    seed_everything(0, verbose=False)
    module = kind(model)
    make_trainer(folder, LoraCallback(r=4), **options).fit(module, loader(causal, batch_size))
    return adapters(module)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative, of all that B has learned (it starts at 0)."""
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if "lora_B" in name]
    first, second = (torch.cat([of[n].flatten() for n in names]) for of in (ours, theirs))
    return float((first - second).norm() / second.norm())


def test_accumulation_is_one_large_batch(tmp_path: Path, llama: str) -> None:
    large = trained(tmp_path, WithSGD, llama, 8)
    accumulated = trained(tmp_path, WithSGD, llama, 1, accumulate_grad_batches=8)
    assert difference(accumulated, large) < 1e-5
    usual = trained(tmp_path, MeanOfMeans, llama, 1, accumulate_grad_batches=8)
    assert difference(usual, large) > 1e-2


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, llama: str) -> None:
    class Checkpointed(WithSGD):
        def __init__(self, model: str) -> None:
            super().__init__(model, gradient_checkpointing=True)

    without = trained(tmp_path, WithSGD, llama, 8)
    assert difference(trained(tmp_path, Checkpointed, llama, 8), without) < 1e-6


def test_resumed_in_mid_epoch_and_within_a_window(tmp_path: Path, llama: str) -> None:
    """With warm-up, dropout and shuffling: bit for bit what the uninterrupted run gives."""
    ResumableRun(
        lambda: CausalLM(llama, warmup_steps=4),
        lambda: DataLoader(texts(), 1, shuffle=True, collate_fn=causal),  # type: ignore[arg-type]
        lambda: [LoraCallback(r=2, lora_dropout=0.2)],
        options=lambda: {"accumulate_grad_batches": 3},
        spots=("batch4", "batch8", "batch13"),
    ).check(tmp_path)


SAVED = {"r": 4, "modules_to_save": ["lm_head"]}
# (strategy, module, options of LoraCallback)
WAYS: list[tuple[Any, Any, dict[str, Any]]] = [
    (lambda: "ddp", WithSGD, SAVED),
    (lambda: "ddp", MeanOfMeans, SAVED),
    (fully_sharded, WithSGD, SAVED),
    (lambda: on_cpu(auto_wrap_policy={LlamaDecoderLayer, torch.nn.Linear}), WithSGD, {"r": 4}),
]


def on_rank(folder: Path, model: str) -> list[dict[str, Tensor]]:
    """Rank 0 has the first half of each 4 texts, rank 1 the second."""
    rank, states = int(os.environ["RANK"]), []
    rows = [row for i in (0, 4) for row in texts()[i + 2 * rank : i + 2 * rank + 2]]
    for strategy, kind, options in WAYS:
        seed_everything(0, verbose=False)
        module = kind(model)
        trainer = make_trainer(folder, LoraCallback(**options), accumulate_grad_batches=2, devices=2, strategy=strategy(), use_distributed_sampler=False)  # fmt: skip
        trainer.fit(module, loader(causal, 1, rows))
        states.append(adapters(module))
    return states


@pytest.mark.slow
def test_two_processes(tmp_path: Path, llama: str) -> None:
    """DDP, FSDP2 and FSDP1 with two processes give what one process does."""
    one = {}
    for saved in (None, ["lm_head"]):
        seed_everything(0, verbose=False)
        module = WithSGD(llama)
        trainer = make_trainer(tmp_path, LoraCallback(r=4, modules_to_save=saved))
        trainer.fit(module, loader(causal, 4))
        one[saved is None] = adapters(module)
    for states in on_processes(2, on_rank, tmp_path, llama):
        for (_, kind, options), state in zip(WAYS, states, strict=True):
            error = difference(plain_names(state), one["modules_to_save" not in options])
            assert error > 1e-2 if kind is MeanOfMeans else error < 1e-5, kind


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {plain_name(name): value for name, value in state.items()}


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_metrics_in_half_precision(tmp_path: Path, llama: str, precision: Any) -> None:
    """Sums are float64: as near to the truth as the network's own rounding lets them be."""
    module = CausalLM(llama)
    trainer = make_trainer(tmp_path, precision=precision)
    [logged] = trainer.validate(module, loader(causal), verbose=False)
    scores, labels = scores_and_labels(module, causal)
    assert logged["val_loss"] == pytest.approx(float(cross_entropy(scores, labels)), rel=3e-3)
    assert math.log(logged["val_perplexity"]) == pytest.approx(logged["val_loss"], rel=1e-6)


def test_a_hopeless_loss_has_a_perplexity(tmp_path: Path, llama: str) -> None:
    """e^30 overflows float16; the loss is 30 all the same."""

    class Hopeless(CausalLM):
        def token_loss(self, batch: Any) -> Any:
            found = super().token_loss(batch)
            return type(found)(30 * self.batch_weight(batch), found.correct)

    [logged] = make_trainer(tmp_path, precision="16-true").validate(
        Hopeless(llama), loader(causal), verbose=False
    )
    assert logged["val_loss"] == 30
    assert logged["val_perplexity"] == pytest.approx(math.exp(30), rel=1e-6)


def test_an_encoder_would_copy(tmp_path: Path) -> None:
    """BERT with a language model's head sees the next token, unless it is said to be a decoder."""
    from transformers import AutoModelForCausalLM, BertConfig

    sizes: dict[str, Any] = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    for causal in (True, False):
        network = AutoModelForCausalLM.from_config(BertConfig(**sizes, is_decoder=causal)).eval()
        first, second = network(ids).logits[:, 0]
        assert torch.equal(first, second) == causal
        network.save_pretrained(tmp_path / str(causal))
    CausalLM(str(tmp_path / "True")).configure_model()
    with pytest.raises(ModelError, match=r"is an encoder \(BertLMHeadModel\): .*\(model.model\)"):
        CausalLM(str(tmp_path / "False")).configure_model()


# -- generation ------------------------------------------------------------------------------------


def test_causal_prompts_are_continued(tmp_path: Path, llama: str) -> None:
    """As transformers continues each alone, whichever side is padded."""
    module = CausalLM(llama, max_new_tokens=5)
    right = causal(texts()[:3])
    left = {k: v.flip(1) for k, v in causal([row[::-1] for row in texts()[:3]]).items()}
    data = DataLoader([right, left], batch_size=None)  # type: ignore[arg-type]
    first, second = make_trainer(tmp_path).predict(module, data)  # type: ignore[misc]
    tokenizer = module.tokenizer
    for row, a, b in zip(texts(), first, second, strict=False):
        ids = torch.tensor([row])
        ids = module.network.generate(ids, max_new_tokens=5, attention_mask=torch.ones_like(ids))  # type: ignore[union-attr,operator]
        alone = tokenizer.decode(ids[0, len(row) :], skip_special_tokens=True)
        assert a == b == alone


def test_targets_are_written(tmp_path: Path, t5: str) -> None:
    module = Seq2SeqLM(t5, max_new_tokens=4, generation={"num_beams": 2})
    [written] = make_trainer(tmp_path).predict(module, loader(seq2seq, 8))  # type: ignore[misc]
    batch = seq2seq(texts())
    ids = module.network.generate(batch["input_ids"], max_new_tokens=4, num_beams=2)  # type: ignore[union-attr,operator]
    assert written == module.tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_generation_options_are_checked(llama: str) -> None:
    with pytest.raises(ConfigError, match=r"no option 'temprature'\. Did you mean 'temperature'\?"):
        CausalLM(llama, generation={"temprature": 0.5})
    for name in ("max_length", "return_dict_in_generate"):
        with pytest.raises(ConfigError, match=rf"'{name}' cannot be had: .*\(model.generation\)"):
            CausalLM(llama, generation={name: 5})
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, found 0"):
        CausalLM(llama, max_new_tokens=0)


def test_stop_strings_end_a_text(llama: str) -> None:
    module = CausalLM(llama, max_new_tokens=8)
    module.configure_model()
    module.eval()
    prompt = torch.tensor([texts()[0]])
    [text] = module.generate(prompt)
    module.generation = {"stop_strings": [text[1:3]]}
    [stopped] = module.generate(prompt)
    assert len(stopped) < len(text)
    assert text.startswith(stopped)


@pytest.mark.parametrize("kind", ["GPT2", "OPT", "Llama"])
def test_a_text_ends_where_a_table_of_positions_does(tmp_path: Path, kind: str) -> None:
    """And not with an index out of range, or an assertion on the GPU."""
    import transformers as hf

    tiny_tokenizer().save_pretrained(tmp_path)
    sizes = {"vocab_size": 640, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    own = {"OPT": {"ffn_dim": 32, "word_embed_proj_dim": 32}, "Llama": {"intermediate_size": 32}}
    ids = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": None}
    options = {"max_position_embeddings": 16, **sizes, **ids, **own.get(kind, {})}
    config = getattr(hf, f"{kind}Config")(**options)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    class Watched(CausalLM):
        def written(self, generated: Tensor, input_ids: Tensor) -> Tensor:
            lengths.append(generated.shape[1])
            return super().written(generated, input_ids)

    lengths: list[int] = []
    module = Watched(str(tmp_path), max_new_tokens=20)
    module.configure_model()
    for length in (1, 9, 16):
        module.generate(torch.full((2, length), 7))
    assert lengths == ([21, 29, 36] if kind == "Llama" else [17, 17, 17])
    if kind != "Llama":
        with pytest.raises(RecordError, match=r"17 tokens, and the model has no more than 16 pos"):
            module.generate(torch.full((2, 17), 7))
