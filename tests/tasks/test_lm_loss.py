"""The chunked loss is the plain one: value and gradients, whatever hangs on the head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lora_lightning import LoraConfig, inject_adapter
from lora_lightning.tasks import chunked_cross_entropy
from lora_lightning.tasks.chunked_cross_entropy import head_loss
from lora_lightning.tasks.lm_loss import Finish, LMLoss, next_tokens
from lora_lightning.utilities.constants import IGNORE_INDEX

WORDS = 97
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}  # fmt: skip
LLAMA = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 1, "n_head": 4, "initializer_range": 0.5, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GRIFFIN = {**SIZES, "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8, "logits_soft_cap": 2.0}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "initializer_factor": 1.0, "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": WORDS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.5, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}  # fmt: skip

# name: (config, its options, whether by chunks)
NETWORKS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "Llama": ("LlamaConfig", LLAMA, True),
    "tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, True),
    "GPT-2": ("GPT2Config", GPT2, True),
    "a head with a bias": ("PhiConfig", {**LLAMA, "hidden_size": 64}, True),
    "soft cap": ("Gemma2Config", {**LLAMA, "head_dim": 8, "final_logit_softcapping": 5.0}, True),
    "other soft cap": ("RecurrentGemmaConfig", GRIFFIN, True),
    "scores multiplied": ("CohereConfig", {**LLAMA, "logit_scale": 0.3}, True),
    "scores divided": ("GraniteConfig", {**LLAMA, "logits_scaling": 3.0}, True),
    "something unknown": ("HyperCLOVAXConfig", {**LLAMA, "logits_scaling": 3.0}, False),
    "T5": ("T5Config", {**T5, "tie_word_embeddings": False}, True),
    "T5, tied and scaled": ("T5Config", T5, True),
    "BART": ("BartConfig", BART, True),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK", 5 * WORDS)


def build(name: str) -> Any:
    kind, options, _ = NETWORKS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options, use_cache=False)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    network = auto.from_config(config).double().eval()
    with torch.no_grad():
        if hasattr(network, "final_logits_bias"):
            network.final_logits_bias.normal_()
        bias = getattr(network.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias.normal_()
    return network


def batch_of(network: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and targets of three texts."""
    torch.manual_seed(1)
    ids = torch.randint(3, WORDS, (3, 12))
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    labels[1, 7:] = IGNORE_INDEX
    if network.config.is_encoder_decoder:
        shifted = network.prepare_decoder_input_ids_from_labels(labels)
        return {"input_ids": ids[:, :9], "decoder_input_ids": shifted}, labels
    return {"input_ids": ids}, next_tokens(labels)


def plainly(network: Any, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    scores = network(**inputs).logits
    return cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def check_equal(network: Any, by_chunks: bool = True, tolerance: float = 1e-10) -> None:
    inputs, targets = batch_of(network)
    loss = LMLoss()
    for _ in range(2):  # the first is compared with all scores
        found = loss(network, inputs, targets)
        assert found.correct is None
        truth = plainly(network, inputs, targets)
        assert float(abs(found.total - truth).detach() / truth.detach()) < tolerance
        ours, theirs = gradients(network, found.total), gradients(network, truth)
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            assert torch.allclose(gradient, theirs[name], rtol=tolerance, atol=tolerance * 100), (
                name
            )
    assert loss.by_chunks is by_chunks
    with torch.no_grad():
        found = loss(network, inputs, targets)
        scores = network(**inputs).logits
    assert float(abs(found.total - truth.detach()) / truth.detach()) < tolerance
    assert found.correct == ((scores.argmax(-1) == targets) & (targets != IGNORE_INDEX)).sum()


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_plain_loss(name: str) -> None:
    check_equal(build(name), NETWORKS[name][2])


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("soft cap", "cap", None), ("scores multiplied", "scale", 1.0), ("BART", "bias", None)],
)
def test_what_follows_the_head_must_be_known(
    name: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out, the comparison with the network's own scores finds it, and the loss is right."""
    known = Finish.__init__

    def forgets(self: Any, network: Any) -> None:
        known(self, network)
        setattr(self, key, value)

    monkeypatch.setattr(Finish, "__init__", forgets)
    check_equal(build(name), by_chunks=False)
    monkeypatch.setattr("lora_lightning.tasks.lm_loss._close", lambda *scores: True)
    with pytest.raises(AssertionError):  # without the comparison
        check_equal(build(name))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 8]},
    ],
)
@pytest.mark.parametrize("name", ["Llama", "tied"])
def test_adapters(name: str, options: dict[str, Any]) -> None:
    network = build(name)
    inject_adapter(network, LoraConfig(r=2, init_lora_weights=False, **options))
    for parameter in network.parameters():
        parameter.data = parameter.data.double()
    check_equal(network)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_whether_by_chunks_does_not_depend_on_the_precision(name: str, dtype: torch.dtype) -> None:
    network, loss = build(name).to(dtype), LMLoss()
    loss(network, *batch_of(network))
    assert loss.by_chunks is NETWORKS[name][2]


@pytest.mark.parametrize("name", ["soft cap", "scores multiplied", "scores divided", "BART"])
def test_the_comparison_is_sharp_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Finish, "__call__", lambda self, scores: scores)
    network, loss = build(name).bfloat16(), LMLoss()
    loss(network, *batch_of(network))
    assert loss.by_chunks is False


def test_a_head_with_dropout() -> None:
    """What it is compared with has the same dropout."""
    network, loss = build("Llama"), LMLoss()
    options = {"target_modules": ["lm_head"], "init_lora_weights": False}
    inject_adapter(network, LoraConfig(r=2, lora_dropout=0.5, **options))
    network.train()
    inputs, targets = batch_of(network)
    found = loss(network, inputs, targets)
    assert loss.by_chunks
    assert not torch.equal(found.total, loss(network, inputs, targets).total)


def test_a_network_without_a_head_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("Llama")
    monkeypatch.setattr(network, "get_output_embeddings", lambda: None)
    check_equal(network, by_chunks=False)


def test_a_batch_without_learned_tokens() -> None:
    """A loss of 0, and gradients of 0 for all that other processes have gradients for."""
    network = build("Llama")
    inputs, targets = batch_of(network)
    found = LMLoss()(network, inputs, torch.full_like(targets, IGNORE_INDEX))
    assert found.total == 0
    zeros = gradients(network, found.total)
    assert zeros.keys() == gradients(network, plainly(network, inputs, targets)).keys()
    assert not any(map(torch.any, zeros.values()))


def test_a_packed_row_predicts_no_first_tokens() -> None:
    labels = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert next_tokens(labels).tolist() == [[2, 3, 4, 5, 6, IGNORE_INDEX]]
    places = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert next_tokens(labels, places).tolist() == [[2, 3, IGNORE_INDEX, 5, 6, IGNORE_INDEX]]


@pytest.mark.parametrize("asked", [True, False])
def test_balance_of_experts(asked: bool) -> None:
    options = {**LLAMA, "num_local_experts": 4, "output_router_logits": asked}
    config = transformers.MixtralConfig(**options, router_aux_loss_coef=0.5, use_cache=False)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()  # experts know no float64
    inputs, targets = batch_of(network)
    labels = torch.full_like(targets, IGNORE_INDEX)
    labels[:, 1:] = targets[:, :-1]
    theirs = network(**inputs, labels=labels)
    loss = LMLoss()
    found = loss(network, inputs, targets)
    assert loss.by_chunks
    assert (found.balance is not None) is asked
    mean = found.total / (targets != IGNORE_INDEX).sum()
    assert torch.allclose(mean + (found.balance or 0), theirs.loss, rtol=1e-6)
    assert not asked or not torch.allclose(mean, theirs.loss, rtol=1e-3)


# -- precision and memory --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "autocast", "limit"),
    [
        (torch.float32, False, 1e-6),
        (torch.bfloat16, False, 1e-4),
        (torch.float16, False, 1e-5),
        (torch.float32, True, 1e-4),
    ],
)
def test_sums_are_float32(dtype: torch.dtype, autocast: bool, limit: float) -> None:
    """Against float64 on the same hidden states; scores themselves are as the head gives them."""
    torch.manual_seed(0)
    head = nn.Linear(16, WORDS, bias=False).to(dtype)
    hidden = torch.randn(3000, 16).to(dtype).requires_grad_()
    labels = torch.randint(0, WORDS, (3000,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = head_loss(head, hidden, labels)
    assert loss.dtype is torch.float32
    loss.backward()
    wide, exact = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    truth = cross_entropy(wide(exact), labels, reduction="sum")
    truth.backward()
    assert float(abs(loss - truth).detach() / truth.detach()) < limit
    rounding = 1e-5 if dtype is torch.float32 and not autocast else 2**-7
    for ours, theirs in ((hidden.grad, exact.grad), (head.weight.grad, wide.weight.grad)):
        assert float((ours - theirs).norm() / theirs.norm()) < rounding
        assert ours.dtype is dtype


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


def test_scores_of_all_tokens_are_never_held() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, WORDS)
    hidden, labels = torch.randn(400, 16, requires_grad=True), torch.randint(0, WORDS, (400,))
    with Largest() as chunked:
        head_loss(head, hidden, labels)[0].backward()
    with Largest() as plain:
        cross_entropy(head(hidden), labels, reduction="sum").backward()
    assert plain.numbers == 400 * WORDS
    assert chunked.numbers == 400 * 16  # the gradient of what came in


def test_one_backward_pass_only() -> None:
    head, hidden = nn.Linear(16, WORDS), torch.randn(4, 16, requires_grad=True)
    loss, _ = head_loss(head, hidden, torch.tensor([1, 2, 3, 4]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()
