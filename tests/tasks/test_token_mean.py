"""Accumulation over batches and processes is one large batch: the mean over all learned tokens."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lora_lightning import AdaLoraConfig, LoraCallback
from lora_lightning.errors import ConfigError
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.tasks import SequenceClassification
from lora_lightning.tasks.token_mean import TokenMean
from lora_lightning.utilities.dtensor import full_tensor
from tests.helpers.fsdp1_on_cpu import on_cpu
from tests.helpers.fsdp2_modules import fully_sharded
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.resumable_run import ResumableRun, SaveAtSpots
from tests.helpers.tiny_bert import save_tiny_bert

summoned = FullyShardedDataParallel.summon_full_params
WORDS, IGNORE_INDEX = 13, -100
# Learned tokens of each text: very uneven, some with none.
LENGTHS = (1, 12, 3, 0, 7, 2, 30, 1, 0, 4, 1, 9)


class Tokens(TokenMean):
    """Guesses the next word from the last."""

    rate = 0.5

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embed = nn.Embedding(WORDS, 8)
            self.body = nn.Linear(8, 16)
            self.head = nn.Linear(16, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.embed(words)).tanh())

    def batch_weight(self, batch: Tensor) -> Tensor:
        return (batch[:, 1] != IGNORE_INDEX).sum()

    def summed_loss(self, batch: Tensor) -> Tensor:
        scores = self(batch[:, 0]).transpose(1, 2)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return cross_entropy(wide, batch[:, 1], reduction="sum")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.window_loss(self.summed_loss(batch), batch)
        self.log("train_loss", self.window_mean)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class PlainMean(Tokens):
    """As everyone writes it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.summed_loss(batch) / self.batch_weight(batch).clamp(min=1)


class NeverRescaled(Tokens):
    """Divides by the tokens so far, and leaves earlier gradients as they are."""

    def _gradients(self) -> list[Tensor]:
        return [torch.ones(1)]


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Each (2, 31): words, and labels, of which the first are learned."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for learned in lengths:
        text = torch.randint(0, WORDS, (2, 31), generator=generator)
        text[1, learned:] = IGNORE_INDEX
        found.append(text)
    return found


def loader(batch_size: int, data: list[Tensor] | None = None) -> DataLoader:
    return DataLoader(texts() if data is None else data, batch_size)  # type: ignore[arg-type]


def trained(
    folder: Path, kind: Any = Tokens, batch_size: int = 1, callbacks: Any = (), **options: Any
) -> nn.Module:
    module = kind()
    data = options.pop("data", None)
    make_trainer(folder, *callbacks, **options).fit(module, loader(batch_size, data))
    return module


def by_hand(
    windows: list[list[Tensor]], clip: float | None = None, kind: type[Tokens] = Tokens
) -> nn.Module:
    """SGD in float64 on the mean over all learned tokens of each window."""
    module = kind().double()
    for window in windows:
        batch = torch.stack(window)
        loss = module.summed_loss(batch) / module.batch_weight(batch).clamp(min=1)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        factor = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= module.rate * factor * gradient
    return module


@torch.no_grad()
def error(module: nn.Module, truth: nn.Module) -> float:
    """Relative error of the update."""
    start = Tokens().double()

    def update(of: nn.Module) -> Tensor:
        pairs = zip(of.parameters(), start.parameters(), strict=True)
        return torch.cat([(p.detach().double() - s).flatten() for p, s in pairs])

    return float((update(module) - update(truth)).norm() / update(truth).norm())


WINDOWS = {size: [texts()[i : i + size] for i in range(0, 12, size)] for size in (4, 5, 8)}


@pytest.mark.parametrize(("batch_size", "accumulate", "window"), [(1, 4, 4), (2, 2, 4), (4, 1, 4), (1, 8, 8), (1, 5, 5)])  # fmt: skip
def test_accumulation_is_one_large_batch(
    tmp_path: Path, batch_size: int, accumulate: int, window: int
) -> None:
    """Also in the last window of the epoch (8 + 4 texts, 5 + 5 + 2)."""
    module = trained(tmp_path, batch_size=batch_size, accumulate_grad_batches=accumulate)
    assert error(module, by_hand(WINDOWS[window])) < 1e-5


@pytest.mark.parametrize("kind", [PlainMean, NeverRescaled])
def test_it_can_fail(tmp_path: Path, kind: type) -> None:
    assert error(trained(tmp_path, kind, accumulate_grad_batches=4), by_hand(WINDOWS[4])) > 1e-2


def test_several_epochs(tmp_path: Path) -> None:
    module = trained(tmp_path, accumulate_grad_batches=5, max_epochs=3)
    assert error(module, by_hand(WINDOWS[5] * 3)) < 1e-5


def test_clipping_sees_the_mean_over_the_window(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05}
    truth = by_hand(WINDOWS[4], clip=0.05)
    assert error(trained(tmp_path, **options), truth) < 1e-5
    assert error(by_hand(WINDOWS[4]), truth) > 1e-2  # it was clipped


def test_windows_without_a_token_change_nothing(tmp_path: Path) -> None:
    data = texts((0, 0, 0, 0, 0, 3, 0, 5))
    module = trained(tmp_path, accumulate_grad_batches=4, data=data)
    assert error(module, by_hand([data[:4], data[4:]])) < 1e-5
    nothing = trained(tmp_path, accumulate_grad_batches=4, data=texts((0,) * 8))
    assert all(map(torch.equal, nothing.parameters(), Tokens().parameters()))


def test_what_is_logged_is_the_mean_over_the_window(tmp_path: Path) -> None:
    module = trained(tmp_path, accumulate_grad_batches=12)
    batch = torch.stack(texts())
    truth = Tokens().double().summed_loss(batch).detach() / module.batch_weight(batch)  # type: ignore[operator]
    logged = module.trainer.callback_metrics["train_loss"]  # type: ignore[union-attr,operator]
    assert float(logged) == pytest.approx(float(truth), rel=1e-6)


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(tmp_path: Path, precision: Any) -> None:
    module = trained(tmp_path, accumulate_grad_batches=4, precision=precision)
    # bfloat16 has 8 bits, and an update of weights in it is rounded to theirs.
    limit = {"bf16-mixed": 1e-2, "bf16-true": 0.1, "64-true": 1e-12}[precision]
    assert error(module, by_hand(WINDOWS[4])) < limit


def test_gradient_scaler(tmp_path: Path) -> None:
    plugin = MixedPrecision("bf16-mixed", "cpu")  # the CPU's half precision
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = trained(tmp_path, accumulate_grad_batches=4, plugins=[plugin])
    without = trained(tmp_path, accumulate_grad_batches=4, precision="bf16-mixed")
    assert error(module, by_hand(WINDOWS[4])) < 1e-2
    assert all(map(torch.allclose, module.parameters(), without.parameters()))


# -- with adapters ---------------------------------------------------------------------------------


def test_adalora(tmp_path: Path) -> None:
    """Its orthogonality term is added to the gradient of the mean, once a step."""

    def adapters(batch_size: int, accumulate: int, kind: type = Tokens) -> list[Tensor]:
        config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, orth_reg_weight=0.5)  # fmt: skip
        seed_everything(1, verbose=False)
        options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
        module = trained(tmp_path, kind, batch_size, [LoraCallback(config)], **options)
        return [p.detach() for n, p in module.named_parameters() if ".adapters." in n]

    whole = adapters(4, 1)
    pairs = zip(adapters(1, 4), whole, strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
    assert not all(map(torch.allclose, adapters(1, 4, PlainMean), whole))


class WithDropout(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(self.body, nn.Dropout(0.2))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Forgets(WithDropout):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        pass


def half_way(module: Any) -> ResumableRun:
    """Checkpoints within a window of 4 batches, and within the last one, which has 2."""
    return ResumableRun(
        module,
        lambda: loader(2, texts()),
        lambda: [LoraCallback(r=2, lora_dropout=0.2, target_modules=["embed", "body.0", "head"])],
        options=lambda: {"accumulate_grad_batches": 4},
        spots=("batch2", "batch5", "batch10"),
    )


def test_resumed_within_a_window(tmp_path: Path) -> None:
    half_way(WithDropout).check(tmp_path)


def test_resuming_can_fail(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        half_way(Forgets).check(tmp_path)


def test_gradients_that_a_resumed_run_lacks_count_for_nothing(tmp_path: Path) -> None:
    """Without LoraCallback, Lightning forgets what was accumulated, and the place in the data."""
    saver = SaveAtSpots(tmp_path, ("batch2",))
    trained(tmp_path, callbacks=[saver], accumulate_grad_batches=4)
    resumed = Tokens()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=4, limit_train_batches=4)
    trainer.fit(resumed, loader(1), ckpt_path=tmp_path / "batch2.ckpt")
    assert error(resumed, by_hand([texts()[:2]])) < 1e-5


# -- several processes -----------------------------------------------------------------------------


class Sharded(Tokens):
    """Shards itself (FSDP2)."""

    def configure_model(self) -> None:
        if not isinstance(self, FSDPModule):
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            for unit in (self.body, self.head, self):
                fully_shard(unit, mesh=mesh)


class PlainMeanSharded(Sharded):
    training_step = PlainMean.training_step  # type: ignore[assignment]


# (strategy, what is exact, what is not)
PROCESSES: list[tuple[Any, type, type]] = [
    (lambda: "ddp", Tokens, PlainMean),
    (on_cpu, Tokens, PlainMean),  # FSDP1
    (fully_sharded, Sharded, PlainMeanSharded),
]


def on_rank(folder: Path) -> list[dict[str, Tensor]]:
    """Rank 0 has the first half of each window of 4 texts, rank 1 the second."""
    rank = int(os.environ["RANK"])
    data = [text for window in WINDOWS[4] for text in window[2 * rank : 2 * rank + 2]]
    settings: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False}
    states = []
    for strategy, *kinds in PROCESSES:
        for kind in kinds:
            module = kind()
            trainer = make_trainer(
                folder, accumulate_grad_batches=2, strategy=strategy(), **settings
            )
            trainer.fit(module, loader(1, data))
            root = trainer.strategy.model
            with summoned(root) if isinstance(root, FullyShardedDataParallel) else nullcontext():
                states.append({n: full_tensor(p).clone() for n, p in named_parameters(module)})
    return states


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """DDP, FSDP1 and FSDP2, all of them trained in full."""
    module, truth = Tokens(), by_hand(WINDOWS[4])
    for states in on_processes(2, on_rank, tmp_path):
        for exact, plain in zip(states[::2], states[1::2], strict=True):
            module.load_state_dict(exact)
            assert error(module, truth) < 1e-5
            module.load_state_dict(plain)
            assert error(module, truth) > 1e-2  # so that the test can fail


def test_weighted_classes(tmp_path: Path) -> None:
    """Classification's own weights: what a class counts."""
    model = str(save_tiny_bert(tmp_path / "model"))
    ids = torch.randint(4, 17, (8, 6), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": torch.tensor(i % 3 == 1).long()} for i, row in enumerate(ids)]  # fmt: skip

    def head(batch_size: int, accumulate: int, kind: Any = SequenceClassification) -> Tensor:
        seed_everything(1, verbose=False)
        module = kind(model, label_names=["a", "b"], class_weights={"b": 7.0})
        module.configure_model()
        module.eval()
        options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 1}
        make_trainer(tmp_path, **options).fit(module, DataLoader(data, batch_size))  # type: ignore[arg-type]
        return module.network.classifier.weight.detach()

    class SGD(SequenceClassification):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    class PlainMeanSGD(SGD):
        def window_loss(self, total: Tensor, batch: Any) -> Tensor:
            return total / self._window_weight

    whole_batch = head(4, 1, SGD)
    assert torch.allclose(head(1, 4, SGD), whole_batch, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(head(1, 4, PlainMeanSGD), whole_batch, rtol=1e-2)


def test_strategies_that_accumulate_by_themselves_are_refused(tmp_path: Path) -> None:
    module = Tokens()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
    type(trainer.strategy).handles_gradient_accumulation = property(lambda self: True)  # type: ignore[assignment]
    try:
        with pytest.raises(ConfigError, match=r"mean of 2 means.*accumulate_grad_batches=1"):
            trainer.fit(module, loader(1))
    finally:
        del type(trainer.strategy).handles_gradient_accumulation
