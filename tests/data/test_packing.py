"""Packed rows are what the examples are alone: loss and gradients, whatever attention computes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lora_lightning.data.batches.collate import PackRows, PadRows
from lora_lightning.data.batches.example_store import BatchRows, ExampleStore, Ragged, Tokens
from lora_lightning.data.batches.packing import best_fit_decreasing
from lora_lightning.data.samples.sample import Example
from lora_lightning.utilities.constants import IGNORE_INDEX

VOCABULARY = 64


def examples(count: int = 11, longest: int = 12, seed: int = 0) -> list[Example]:
    """Of 2 tokens or more, the first third of each only read."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [chance.randrange(1, VOCABULARY) for _ in range(chance.randint(2, longest))]
        read = max(len(ids) // 3, 1)
        made.append(Example(ids, [IGNORE_INDEX] * read + ids[read:]))
    return made


SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def model(kind: str, attention: str = "sdpa", **config) -> torch.nn.Module:
    import transformers

    made = {
        "llama": lambda: transformers.LlamaConfig(**SHAPE, **config),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_DROPOUT
        ),
        "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8),
        "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=4),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **SHAPE, head_dim=8, sliding_window=4, pad_token_id=0, bos_token_id=2, eos_token_id=1
        ),
    }[kind]()
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention)
    for parameter in network.parameters():
        if parameter.dim() > 1:  # so that attention says something
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def loss_and_gradients(network: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Mean over learned tokens."""
    network.zero_grad()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = network(**inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
    )
    loss.backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


def off(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


def batches(length: int = 24, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same examples packed and each alone."""
    store = ExampleStore(examples())
    packed = BatchRows(store, best_fit_decreasing(store.lengths, length))
    rows = [packed[index] for index in range(len(packed))]
    assert max(map(len, rows)) > 1
    alone = BatchRows(store)
    return PackRows(length, **options)(rows), PadRows()([alone[i] for i in range(len(alone))])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_is_unpacked(kind, attention):
    packed, alone = batches()
    network = model(kind, attention).train()
    expected, gradients = loss_and_gradients(network, alone)
    loss, packed_gradients = loss_and_gradients(network, packed)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert off(packed_gradients, gradients) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma3"])  # Gemma has windows
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers, and of the compiler
@pytest.mark.slow
def test_packed_is_unpacked_under_flex_attention(kind):
    """The loss; on a CPU flex_attention has no backward."""
    packed, alone = batches()
    network = model(kind, "flex_attention").eval()
    found = []
    with torch.no_grad():
        for batch in (packed, alone):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            logits = network(**inputs, use_cache=False).logits
            found.append(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1),
                    batch["labels"][:, 1:].flatten(),
                    ignore_index=IGNORE_INDEX,
                )
            )
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "flash_attention_2"])
def test_packed_is_unpacked_on_a_gpu(attention):
    """In bfloat16, which FlashAttention wants: as well as it is under eager attention there."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash_attn is not installed")
    errors = []
    for kind in ("eager", attention):
        packed, alone = batches(flat="flash" in kind)
        network = model("llama", kind, head_dim=32).train().to("cuda", torch.bfloat16)
        (_, gradients), (_, packed_gradients) = (
            loss_and_gradients(network, {k: v.to("cuda") for k, v in batch.items()})
            for batch in (alone, packed)
        )
        errors.append(off(packed_gradients.float(), gradients.float()))
    assert errors[1] < 2 * errors[0] + 1e-3


def test_packed_is_unpacked_under_gradient_checkpointing():
    packed, alone = batches()
    network = model("llama").train()
    expected, gradients = loss_and_gradients(network, alone)
    enable = getattr(network, "activation_checkpointing_enable", None)  # the newer name
    (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    loss, packed_gradients = loss_and_gradients(network, packed)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert off(packed_gradients, gradients) < 1e-5


def test_all_rows_in_one_are_the_same():
    packed, alone = batches(flat=True)
    assert packed["input_ids"].shape == (1, sum(len(e.input_ids) for e in examples()))
    network = model("llama")
    expected, gradients = loss_and_gradients(network, alone)
    loss, packed_gradients = loss_and_gradients(network, packed)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert off(packed_gradients, gradients) < 1e-5


@pytest.mark.slow
def test_packed_is_unpacked_when_compiled():
    packed, alone = batches()
    network = model("llama")
    expected, gradients = loss_and_gradients(network, alone)
    network.compile(backend="aot_eager", fullgraph=True)
    loss, packed_gradients = loss_and_gradients(network, packed)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert off(packed_gradients, gradients) < 1e-5


@pytest.mark.parametrize("broken", ["running on", "cached", "masked", "first token learned"])
def test_the_comparison_can_fail(broken, monkeypatch):
    """Positions that restart do not do it alone: nothing else may keep transformers from looking."""
    packed, alone = batches()
    network = model("llama")
    expected, gradients = loss_and_gradients(network, alone)
    if broken == "running on":
        packed["position_ids"] = torch.arange(24).expand_as(packed["input_ids"])
    elif broken == "masked":
        packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    elif broken == "first token learned":
        starts = (packed["position_ids"] == 0) & (packed["input_ids"] != 0)
        packed["labels"] = packed["input_ids"].where(starts, packed["labels"])
    else:  # a model's default
        forward = network.forward
        monkeypatch.setattr(network, "forward", lambda *a, use_cache, **k: forward(*a, **k))
    loss, packed_gradients = loss_and_gradients(network, packed)
    assert loss != pytest.approx(expected, rel=1e-4)
    assert off(packed_gradients, gradients) > 1e-2


def test_packed_rows_by_hand():
    rows = [
        [tokens([5, 6, 7], [5, 6, 7]), tokens([8, 9], [IGNORE_INDEX, 9])],
        [tokens([3, 4], [IGNORE_INDEX, 4])],
    ]
    batch = PackRows(6, pad_id=1)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1], [3, 4, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    n = IGNORE_INDEX
    assert batch["labels"].tolist() == [[n, 6, 7, n, 9, n], [n, 4, n, n, n, n]]
    flat = PackRows(6, flat=True)(rows)
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padded_rows_by_hand():
    batch = PadRows(pad_id=1)([[tokens([5, 6, 7], [5, 6, 7])], [tokens([8], [2, 9])]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [2, 9, IGNORE_INDEX]]


def tokens(input_ids: list[int], labels: list[int]) -> Tokens:
    return Tokens.of(Example(input_ids, labels))


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_in_one_row_that_it_fits(seed):
    chance = random.Random(seed)
    lengths = [min(int(chance.lognormvariate(3.5, 0.8)) + 1, 256) for _ in range(500)]
    rows = best_fit_decreasing(lengths, 256)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert all(sum(lengths[index] for index in row) <= 256 for row in rows)
    fewest = -(-sum(lengths) // 256)
    assert len(rows) <= 1.03 * fewest + 1
    in_order = greedy(lengths, 256)
    assert len(in_order) > 1.1 * fewest  # so the bound says something


def greedy(lengths: list[int], capacity: int) -> list[list[int]]:
    rows, room = [], 0
    for index, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = capacity
        rows[-1].append(index)
        room -= length
    return rows


def test_packing_by_hand():
    assert best_fit_decreasing([3, 5, 2, 4, 6], 8) == [[4, 2], [1, 0], [3]]
    assert best_fit_decreasing([], 8) == []


def test_a_store_holds_what_it_is_given():
    made = examples(50)
    store = ExampleStore(iter(made))
    assert len(store) == 50
    for example, stored in zip(made, [store[i] for i in range(50)], strict=True):
        assert stored.input_ids.tolist() == example.input_ids
        assert stored.labels.tolist() == example.labels
    assert store.lengths == [len(e.input_ids) for e in made]
    assert len(ExampleStore([])) == 0


def test_a_store_takes_8_bytes_a_token():
    store = ExampleStore(examples(200))
    values = [store._lists._values]
    assert sum(v.untyped_storage().nbytes() for v in values) == 8 * sum(store.lengths)


def test_the_row_past_the_end_teaches_nothing():
    store = ExampleStore(examples(3))
    for rows in (BatchRows(store), BatchRows(store, [[0, 2], [1]])):
        (filler,) = rows[len(rows)]
        assert set(filler.labels.tolist()) == {IGNORE_INDEX}
        with pytest.raises(IndexError):
            rows[len(rows) + 1]
    assert store[0].labels.tolist() == examples(3)[0].labels


def test_lengths_of_packed_rows():
    store = ExampleStore(examples(3))
    first, second, third = store.lengths
    assert BatchRows(store, [[0, 2], [1]]).lengths == [first + third, second]
    assert Ragged([[1, 2], [], [3]]).lengths == [2, 0, 1]
