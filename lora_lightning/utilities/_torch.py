"""The private names of torch that this package uses, one accessor each; present in torch 2.13.

`nn.Module`'s own dictionaries (`_modules`, `_parameters`, `_buffers`, the hooks) are not among
them: torch's own documentation on writing modules names them, and they stand where they are used.
`tests/utilities/test_torch_private_names.py` has a test for each, which fails when torch changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils.data import DataLoader

# Of torch's schedulers, with an entry for each parameter group
_LISTS_OF_SCHEDULERS = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)


def functional_transform_is_active() -> bool:
    """True inside torch.func (vmap, grad, jvp) and forward-mode AD."""
    functorch: bool = torch._C._are_functorch_transforms_active()
    return functorch or forward_ad._current_level >= 0


def default_store() -> Any:
    """The key-value store by which the processes of the default group found each other."""
    return torch.distributed.distributed_c10d._get_default_store()


def call_when_backward_ends(function: Callable[[], None]) -> None:
    """Have `function` called once the backward pass that is running has ended.

    For a hook on a gradient, as DDP and FSDP do it.
    """
    torch.autograd.Variable._execution_engine.queue_callback(function)


def next_operation_number() -> int:
    """The number that autograd gives to the next operation that this thread records."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def number_of_running_backward() -> int | None:
    """The number of the recorded operation whose backward is running, or None outside of one."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def version_kept(tensor: Tensor) -> AbstractContextManager[None]:
    """Allow writing to `tensor` inside, although a graph has saved it."""
    from torch.autograd.grad_mode import _unsafe_preserve_version_counter

    return _unsafe_preserve_version_counter(tensor)


def share_gradient_hooks(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Have the hooks on the gradient of `parameter` act on that of `other`, too.

    They stay the same ones: what the handle of one takes off is gone from both.
    """
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(parameter, name)
        if hooks is not None:
            setattr(other, name, hooks)


def is_flattened(tensor: object) -> bool:
    """True if FSDP1 has laid this parameter into a flat one that it shards."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def mixed_precision_policy(unit: nn.Module) -> Any:
    """The `MixedPrecisionPolicy` that `fully_shard` was given for `unit`."""
    return unit._get_fsdp_state()._mp_policy  # type: ignore[operator]


def unscales_in_step(optimizer: Optimizer) -> bool:
    """True for a fused optimizer, which takes the gradient scale into its step and unscales there.

    `torch.amp.GradScaler` asks the same attribute.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def keep_scheduler_groups(lr_scheduler: object, kept: list[int], count: int) -> None:
    """Leave only what a scheduler of `count` parameter groups holds for those with indices `kept`.

    So of those inside it, too; None has none.
    """
    for inner in getattr(lr_scheduler, "_schedulers", []):  # of SequentialLR and ChainedScheduler
        keep_scheduler_groups(inner, kept, count)
    for name in _LISTS_OF_SCHEDULERS:
        values = getattr(lr_scheduler, name, None)
        if isinstance(values, list) and len(values) == count:
            setattr(lr_scheduler, name, [values[index] for index in kept])


def has_workers(loader: DataLoader[Any]) -> bool:
    """True once a DataLoader with persistent workers has made them."""
    return loader._iterator is not None


def index_iterator(iterator: object) -> Iterator[Any] | None:
    """The indices that a DataLoader's iterator has yet to load, batch by batch.

    Drawn from it, they are left out and nothing is loaded. None for an iterator that is not
    torch's.
    """
    return getattr(iterator, "_sampler_iter", None)


def stored_values(tensor: Tensor) -> Tensor:
    """The numbers that `tensor` stores: of a sparse gradient the rows, which may repeat.

    `Tensor.values` does so for coalesced ones only.
    """
    return tensor._values() if tensor.is_sparse else tensor


def own_state(module: nn.Module, prefix: str) -> dict[str, Any]:
    """What a module alone, without its children, puts into a state dict: extra state, too."""
    found: dict[str, Any] = {}
    module._save_to_state_dict(found, prefix, False)
    return found


def load_own_state(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Load what `own_state` gave; RuntimeError if a tensor has another shape."""
    errors: list[str] = []
    module._load_from_state_dict(state, prefix, {}, False, [], [], errors)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, _IncompatibleKeys([], []))
    if errors:
        raise RuntimeError("; ".join(errors))


def fake_tensors() -> AbstractContextManager[Any]:
    """Make tensors inside that have shape, dtype, device and history, but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def asks_for_values(error: BaseException) -> bool:
    """True if an operation failed because fake tensors have no values."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
    )

    return isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))
