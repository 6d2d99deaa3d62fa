"""LightningModules that shard themselves (FSDP2), and one without what cannot be compared."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.helpers.lightning_modules import Net


class Quiet(Net):
    """Without what draws random numbers or batch statistics, so that processes can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.body[1] = nn.Identity()


def shard(module: Any, **options: Any) -> None:
    """The body as a unit, and the rest; once only, and not without a strategy that shards."""
    if isinstance(module.body, FSDPModule) or module.device_mesh is None:
        return
    mesh = module.device_mesh["data_parallel"]
    fully_shard(module.body, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)


def build(module: Any) -> None:
    if not hasattr(module, "embed"):
        for name, child in Quiet().named_children():
            module.add_module(name, child)


class ShardedLater(Quiet):
    """Built in `__init__`, sharded in `configure_model`: adapters come before sharding."""

    def configure_model(self) -> None:
        shard(self)


class BuiltAndSharded(Quiet):
    """Built and sharded in `configure_model`: adapters come after sharding."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        build(self)
        shard(self)


class WithDropout(Net):
    """All that draws random numbers, sharded."""

    def configure_model(self) -> None:
        shard(self)


class ShardedInBf16(ShardedLater):
    def configure_model(self) -> None:
        shard(self, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


class BuiltAndShardedInBf16(BuiltAndSharded):
    def configure_model(self) -> None:
        build(self)
        shard(self, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


class OnMeta(Quiet):
    """Built without memory; its base is loaded once it has some."""

    base = Quiet().state_dict()

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        with torch.device("meta"):
            build(self)
        shard(self)

    def base_state_dict(self) -> dict[str, Tensor]:
        return self.base


class InitializedOnMeta(OnMeta):
    """Built by `trainer.init_module(empty_init=True)`: adapters come before sharding."""

    def __init__(self) -> None:
        Quiet.__init__(self)

    def configure_model(self) -> None:
        shard(self)


class PlainSGD(ShardedLater):
    """An optimizer without any state, and groups that are empty once the base is frozen."""

    def configure_optimizers(self) -> Any:
        children = [self.norm, self.embed, self.body[0], self.body[2], self.head]
        optimizer = torch.optim.SGD([{"params": list(c.parameters())} for c in children], lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 0.9**e] * 5)]


class Llama(Quiet):
    """A transformers model, every layer a unit, with tied weights and gradient checkpointing."""

    late = False

    def __init__(self) -> None:
        LightningModule.__init__(self)
        if not self.late:
            self.model = llama()

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = llama()
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            for layer in (*self.model.model.layers, self.model):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 8).long().clamp(-31, 31) + 32
        return self.model(input_ids=ids).logits[:, -1, :3]


class LlamaLate(Llama):
    late = True


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlamaForCausalLM(config)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model


# -- what is refused -------------------------------------------------------------------------------


class BodyOnly(Quiet):
    """Leaves the embedding whole."""

    def configure_model(self) -> None:
        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])


class Unsharded(Quiet):
    def configure_model(self) -> None:
        """Shards nothing."""


class TensorParallel(BuiltAndSharded):
    def configure_model(self) -> None:
        build(self)
        parallelize_module(self.body, self.device_mesh["data_parallel"], {"2": ColwiseParallel()})


class NobodyLoads(OnMeta):
    base_state_dict = None  # type: ignore[assignment]


class LoadsLess(OnMeta):
    def base_state_dict(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.base.items() if key != "embed.weight"}


class LosesABuffer(OnMeta):
    """Has a buffer that no state dict holds, and nothing that makes it anew."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            build(self)
            self.norm.register_buffer("table", torch.zeros(4), persistent=False)
            self.norm.reset_parameters = None
        shard(self)


class Factored(ShardedLater):
    """An optimizer whose state has other shapes than the parameters."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters(), lr=1e-2)


class OtherBasePerRank(ShardedLater):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.norm.bias.add_(torch.distributed.get_rank())


class OtherBase(ShardedLater):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.norm.bias.add_(1)


class OwnUnitHead(BuiltAndSharded):
    """The head, which is to be trained as a copy, is an FSDP unit."""

    def configure_model(self) -> None:
        build(self)
        fully_shard(self.head, mesh=self.device_mesh["data_parallel"])
        shard(self)


def strategy(folder: bool, kind: Any = ModelParallelStrategy) -> ModelParallelStrategy:
    return kind(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=folder)


class FSDPWithOwnSeeds(ModelParallelStrategy):
    """Broadcasts nothing."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj


class FullDisk(ModelParallelStrategy):
    """Fails when all but the last byte is written, on every process or on the first alone."""

    full = False
    ranks = (0, 1)

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.full and self.global_rank in self.ranks:
            raise OSError("No space left on device")


class DDPWithOwnSeeds(DDPStrategy):
    broadcast = FSDPWithOwnSeeds.broadcast


def fully_sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
