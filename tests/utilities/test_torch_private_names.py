"""Each private name of torch in `utilities/_torch.py` is there and does what is assumed of it."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.optim import SGD, AdamW, lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lora_lightning.utilities import _torch as private
from tests.helpers.processes import on_processes


def test_functional_transform_is_active() -> None:
    seen: list[bool] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        seen.append(private.functional_transform_is_active())
        return x.sum()

    ask(torch.ones(2))
    torch.func.vmap(ask)(torch.ones(2, 2))
    torch.func.grad(ask)(torch.ones(2))
    with forward_ad.dual_level():
        ask(torch.ones(2))
    ask(torch.ones(2))
    assert seen == [False, True, True, True, False]


def test_default_store(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        store = private.default_store()
        store.set("here", "yes")
        assert store.check(["here"])
        assert not store.check(["there"])
        with pytest.raises(RuntimeError):
            store.wait(["there"], timedelta(seconds=0.2))
        assert store.delete_key("here")
    finally:
        torch.distributed.destroy_process_group()


def test_call_when_backward_ends() -> None:
    first, last = (torch.ones(1, requires_grad=True) for _ in range(2))
    order: list[str] = []
    last.register_hook(lambda _: private.call_when_backward_ends(lambda: order.append("end")))
    first.register_hook(lambda _: order.append("first"))
    (first * 2 * last.exp()).backward()
    assert sorted(order) == ["end", "first"]
    assert order[-1] == "end"


@pytest.mark.parametrize("reentrant", [True, False])
def test_numbers_of_operations_tell_when_forward_was(reentrant: bool) -> None:
    seen: list[int] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        number = private.number_of_running_backward()
        if number is not None:
            seen.append(number)
        return x.sin() * x

    x = torch.ones(2, requires_grad=True)
    before = private.next_operation_number()
    first = checkpoint(ask, x, use_reentrant=reentrant)
    between = private.next_operation_number()
    second = checkpoint(ask, x, use_reentrant=reentrant)
    after = private.next_operation_number()
    assert private.number_of_running_backward() is None
    first.sum().backward()
    second.sum().backward()
    assert before <= seen[0] < between <= seen[1] < after
    assert len(seen) == 2


def test_version_kept() -> None:
    def graph_after(change: Any) -> torch.Tensor:
        weight = torch.ones(2, requires_grad=True)
        kept = torch.full((2,), 3.0)
        loss = (weight * kept).sum()
        change(kept)
        loss.backward()
        return weight.grad

    def write(tensor: torch.Tensor) -> None:
        with private.version_kept(tensor):
            tensor.zero_()

    assert graph_after(write).tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph_after(lambda tensor: tensor.zero_())


def test_share_gradient_hooks() -> None:
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    seen: list[str] = []
    first = one.register_hook(lambda gradient: seen.append("gradient"))
    one.register_post_accumulate_grad_hook(lambda parameter: seen.append("after"))
    private.share_gradient_hooks(one, other)
    other.sum().backward()
    assert seen == ["gradient", "after"]
    first.remove()
    other.sum().backward()
    assert seen == ["gradient", "after", "after"]
    private.share_gradient_hooks(torch.nn.Parameter(torch.ones(2)), other)  # none to share


def sharded_names() -> dict[str, Any]:
    """What the accessors say of FSDP1 and FSDP2, in a process of its own."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    inner = nn.Linear(4, 4)
    found = {"before": private.is_flattened(inner.weight)}
    unit = FullyShardedDataParallel(inner, use_orig_params=True, device_id=torch.device("cpu"))
    found["flattened"] = all(map(private.is_flattened, unit.parameters()))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = dist.init_device_mesh("cpu", (1,))
    second = fully_shard(nn.Linear(4, 4), mp_policy=policy, mesh=mesh)
    found["policy"] = private.mixed_precision_policy(second) == policy
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_names_of_fsdp() -> None:
    (found,) = on_processes(1, sharded_names)
    assert found == {"before": False, "flattened": True, "policy": True}
    assert not private.is_flattened(object())


def test_unscales_in_step() -> None:
    parameters = [torch.ones(1, requires_grad=True)]
    assert private.unscales_in_step(AdamW(parameters, fused=True))
    assert not private.unscales_in_step(AdamW(parameters, fused=False))


def test_keep_scheduler_groups() -> None:
    groups = [{"params": [torch.ones(1, requires_grad=True)], "lr": lr} for lr in (1.0, 2.0, 3.0)]
    optimizer = SGD(groups)
    first = lr_scheduler.LambdaLR(optimizer, [lambda n, k=k: 1 / (1 + k * n) for k in range(3)])
    rest = lr_scheduler.CosineAnnealingLR(optimizer, 4)
    schedule = lr_scheduler.SequentialLR(optimizer, [first, rest], [2])
    optimizer.param_groups[:] = [optimizer.param_groups[2]]
    private.keep_scheduler_groups(schedule, [2], 3)
    rates = []
    for _ in range(3):
        optimizer.step()
        schedule.step()
        rates += schedule.get_last_lr()
    assert rates == [1.0, 3.0, pytest.approx(3 * (1 + 2**-0.5) / 2)]
    private.keep_scheduler_groups(None, [2], 3)


def test_has_workers() -> None:
    loader: DataLoader[int] = DataLoader(range(4), num_workers=1, persistent_workers=True)
    assert not private.has_workers(loader)
    iterator = iter(loader)
    assert private.has_workers(loader)
    assert len(list(iterator)) == 4


def test_index_iterator() -> None:
    loaded: list[int] = []

    class Data:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> int:
            loaded.append(index)
            return index

    iterator = iter(DataLoader(Data(), batch_size=2))
    assert next(private.index_iterator(iterator)) == [0, 1]
    assert next(iterator).tolist() == [2, 3]
    assert loaded == [2, 3]
    assert private.index_iterator(iter([])) is None


def test_stored_values() -> None:
    dense = torch.ones(2)
    assert private.stored_values(dense) is dense
    rows = torch.sparse_coo_tensor([[1, 1]], [[1.0], [2.0]], (3, 1))  # not coalesced
    assert private.stored_values(rows).tolist() == [[1.0], [2.0]]


def test_a_test_for_each() -> None:
    tree = ast.parse(Path(private.__file__).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    own = Path(__file__).read_text()
    assert [name for name in names if f"private.{name}" not in own] == []


def test_fake_tensors() -> None:
    class Count(private.TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # fmt: skip
            self.made += 1
            return func(*args, **(kwargs or {}))

    with private.fake_tensors(), Count() as count:  # type: ignore[no-untyped-call]
        rows = torch.ones(2**30, 2**20)  # more than there is
        assert (rows.sum(), rows.shape)[1] == (2**30, 2**20)
    assert count.made >= 2


def test_asks_for_values() -> None:
    with private.fake_tensors():
        rows = torch.ones(3)
        for ask in (lambda: rows.sum().item(), lambda: rows[rows > 0]):
            with pytest.raises(RuntimeError) as found:
                ask()
            assert private.asks_for_values(found.value)
        with pytest.raises(RuntimeError) as found:
            rows @ torch.ones(4)
        assert not private.asks_for_values(found.value)


def test_own_state() -> None:
    class Counting(nn.Linear):
        count = 3

        def get_extra_state(self) -> Any:
            return self.count

        def set_extra_state(self, state: Any) -> None:
            self.count = state

    module = nn.Sequential(Counting(2, 1))
    own = private.own_state(module[0], "0.")
    assert list(own) == ["0.weight", "0.bias", "0._extra_state"]
    assert private.own_state(module, "") == {}  # without its children
    private.load_own_state(module[0], {**own, "0._extra_state": 5}, "0.")
    assert module[0].count == 5
    with pytest.raises(RuntimeError, match="size mismatch"):
        private.load_own_state(module[0], {"0.bias": torch.zeros(2)}, "0.")
