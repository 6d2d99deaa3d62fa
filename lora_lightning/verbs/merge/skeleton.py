"""A task of this library with all its adapters, but without the values of its base.

Those are read when a weight is merged, one at a time, and compared with what the adapters were
trained on. Until then a number stands for each, shown in the weight's shape.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lightning
from lora_lightning.adapters.modules_to_save import HeldTensors
from lora_lightning.adapters.trainable_tokens import TiedTrainableTokensAdapter
from lora_lightning.checkpoint.fingerprint import digest
from lora_lightning.checkpoint.loading import put_on_skeleton
from lora_lightning.checkpoint.state_dict import KEY, OPTIONS, TASK
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.merging import check_mergeable, written_tensors
from lora_lightning.engine.switching import active_adapters, set_adapter
from lora_lightning.errors import AdapterMismatchError, first_few
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.tasks.network import network_skeleton
from lora_lightning.verbs.merge.base_files import base_files
from lora_lightning.verbs.merge.layout import Group, Layout, NotByShardsError, Tensors
from lora_lightning.verbs.merge.quantized import is_rounded, rounded
from lora_lightning.verbs.merge.shards import Part
from lora_lightning.verbs.merge.tying import untie_head

_NETWORK = "network."


class Skeleton:
    """What is to be written of a run, tensor by tensor.

    Args:
        file: The checkpoint.
        checkpoint: Its content.
        adapters: The names of the adapters that are merged.
        options: Of the task, beside those in the checkpoint.

    Raises:
        NotByShardsError: If it has to be done in memory, and why.

    """

    def __init__(
        self, file: Path, checkpoint: dict[str, Any], adapters: list[str], **options: Any
    ) -> None:
        self.file = file
        self.base = checkpoint[KEY]["base"]
        task = getattr(lora_lightning, checkpoint[TASK])(**checkpoint[OPTIONS], **options)
        self.task = task
        found = base_files(task.model_name, task.options.revision)
        if found is None:
            raise NotByShardsError("its base has no safetensors files")
        own = network_skeleton(
            task.auto_class, task.model_name, task.options, **task.network_options()
        )
        if getattr(own.config, "quantization_config", None) is not None:
            raise NotByShardsError("the files of its base are quantized")
        self.layout = Layout(own, found)
        task.network = self.network = _with_stand_ins(own)
        moved = put_on_skeleton(task, file, checkpoint).moved
        set_adapter(task, adapters)
        self.untied = untie_head(self.network, copy=False)
        check_mergeable(self.network)
        self.constants = self._constants()
        places = self.layout.shapes
        self.constants |= {
            name: value
            for key, value in moved.items()
            if isinstance(value, Tensor) and (name := key.removeprefix(_NETWORK)) in places
        }
        self.jobs = self._jobs()
        self.groups, self.more = self._selected()
        self.written: list[str] = []

    def _constants(self) -> Tensors:
        """What trained in full: modules, and biases."""
        found: Tensors = {}
        for path, layer in named_adapted_layers(self.network):
            copy = layer.trained_copy() if layer.trains_in_place else None
            for name, tensor in copy.module.state_dict().items() if copy is not None else ():
                found[f"{path}.{name}"] = tensor
        for name, module, record in trained_biases(self.network):
            if record.shown:
                found[name] = record.parameter(module).detach()
        return found

    def _jobs(self) -> dict[str, tuple[str, AdaptedLayer, str]]:
        """Which layer changes a tensor, by the tensor's name: its path, the layer, the weight."""
        jobs: dict[str, tuple[str, AdaptedLayer, str]] = {}
        active = active_adapters(self.network)
        for path, layer in named_adapted_layers(self.network):
            adapters = [layer.adapters[name] for name in active if name in layer.adapters]
            if all(isinstance(adapter, TiedTrainableTokensAdapter) for adapter in adapters):
                continue  # the rows of the table that it shares
            written = [name for name, _ in written_tensors(path, layer, adapters)]
            if written and not layer.is_merged_exactly():
                raise NotByShardsError(f"{path!r} has a forward of its own, which has to be tried")
            for weight in layer.weight_shapes():
                for name in {weight, layer.bias_name(weight)} & {*written}:
                    jobs[f"{path}.{name}"] = path, layer, weight
        return jobs

    def _selected(self) -> tuple[list[Group], Tensors]:
        """The groups that are written, and what is written beside them.

        Raises:
            NotByShardsError: If the network has a tensor that neither files nor checkpoint have.

        """
        shapes, groups = self.layout.shapes, []
        for group in self.layout.groups:
            other = [n for n, t in group.targets.items() if t.shape != shapes[n].shape]
            if not other:
                groups.append(group)
            elif other != [*group.targets] or not {*other} <= self.constants.keys():
                raise NotByShardsError(f"{first_few(other)} has another shape in its files")
        there = {name for group in groups for name in group.targets}
        more = {n: t for n, t in self.constants.items() if n not in there and n in shapes}
        aliases = dict(self.network.all_tied_weights_keys)
        if self.untied is not None:
            head, table = (f"{path}.weight" for path in self.untied)
            aliases.pop(head, None)
            if head not in there and table in there:
                more.setdefault(head, self.layout.group_of[table].targets[table])
        # Files may hold what is tied twice; it is written once, as transformers does.
        again = {name for name, source in aliases.items() if source in there}
        groups = [group for group in groups if not group.targets.keys() <= again]
        ends = ".weight", ".bias"
        gone = [n for n in self.base if n.startswith(_NETWORK) and n.endswith(ends)]
        gone = [n for name in gone if (n := name.removeprefix(_NETWORK)) not in shapes]
        if gone:
            raise NotByShardsError(f"its files have no {first_few(gone)}")
        parameters = {name for name, _ in self.network.named_parameters() if name in shapes}
        tied = {n for pair in aliases.items() for n in pair if there & {*pair}}
        missing = sorted(parameters - there - more.keys() - tied)
        missing += sorted(self.jobs.keys() - there - more.keys())
        if missing:
            raise NotByShardsError(f"its files have no {first_few(missing)}")
        return groups, more

    def parts(self, dtype: torch.dtype | None) -> list[Part]:
        """What is written, in the order of the files; in `dtype`, or that of the files."""
        usual = self.usual_dtype()
        named = [([*group.targets], group.targets, group.dtype, group) for group in self.groups]
        parts = []
        for names, shapes, stored, group in [
            *named,
            *(([name], {name: tensor}, usual, None) for name, tensor in self.more.items()),
        ]:
            wanted = dtype or stored
            planned = self.layout.reverted(
                {n: _cast(torch.empty_like(shapes[n], device="meta"), wanted) for n in names}
            )
            sizes = {name: tensor.nbytes for name, tensor in planned.items()}
            parts.append(Part(sizes, partial(self._made, names, group, wanted)))
        return parts

    def usual_dtype(self) -> torch.dtype:
        """The dtype that most tensors have in the files."""
        own = [group.dtype for group in self.groups if group.dtype.is_floating_point]
        return max(own, key=own.count) if own else torch.float32

    def _made(self, names: list[str], group: Group | None, dtype: torch.dtype) -> Tensors:
        plain = [n for n in names if n not in self.jobs and n not in self.constants]
        plain = [] if group is None else plain
        read = self.layout.read(group) if group is not None and plain else {}
        found = {
            name: self.as_trained_on(name, read[name]) if name in plain else self.value(name)
            for name in names
        }
        self.written += names
        return self.layout.reverted({name: _cast(t, dtype) for name, t in found.items()})

    def check_complete(self) -> None:
        """Make sure that all that training changed was written, once."""
        wrong = [n for n in (*self.jobs, *self.constants) if self.written.count(n) != 1]
        wrong = [n for n in wrong if n in self.layout.shapes]
        if wrong:
            raise RuntimeError(f"not written once: {first_few(wrong)}")  # a fault of ours

    # -- values ------------------------------------------------------------------------------------

    def value(self, name: str) -> Tensor:
        """A tensor of the network with all that training has made of it, in at least its dtype."""
        if name not in self.jobs:
            return self._read(name)
        path, layer, weight = self.jobs[name]
        own = {n: layer._parameters.get(n) for n in (weight, layer.bias_name(weight))}
        here = {n: p for n, p in own.items() if p is not None}
        try:
            for each in here:
                tensor = self._read(f"{path}.{each}")
                wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
                layer._parameters[each] = nn.Parameter(wide, False)
            written = name.rpartition(".")[2]
            merged = layer.merged_tensors(active_adapters(self.network), [weight])
            layer.store_weight(merged[written], written)  # in the layout of the network
            result = layer._parameters[written]
            assert result is not None
            return result.detach()
        finally:
            layer._parameters.update(here)

    def _read(self, name: str) -> Tensor:
        """A tensor as the adapters found it, or as it trained in full."""
        if name in self.constants:
            return self.constants[name]
        if name not in self.layout.group_of and self.untied is not None:
            name = f"{self.untied[1]}.weight"  # the head's, before it was untied
        return self.as_trained_on(name, self.layout.read(self.layout.group_of[name])[name])

    def as_trained_on(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the files with the precision that the run had it in, checked to be the same.

        Raises:
            AdapterMismatchError: If the adapters were trained on other values.

        """
        saved = self.base.get(f"{_NETWORK}{name}")
        if saved is None:  # trained in full
            return tensor
        parts = {f"{_NETWORK}{name}": tensor}
        if is_rounded(f"{_NETWORK}{name}", self.base):
            path = name.removesuffix("weight")
            given = tensor.to(getattr(torch, self.task.options.dtype or "float32"))
            packed = rounded(given, self.task.options.quantize)
            parts = {f"{_NETWORK}{path}{part}": t for part, t in packed.tensors().items()}
            tensor = packed.dense()
        elif tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, saved[1]))
            parts = {f"{_NETWORK}{name}": tensor}
        for part, value in parts.items():
            shape, _, wanted = self.base[part]
            if list(value.shape) != shape or digest(value) != wanted:
                raise AdapterMismatchError(
                    f"The adapters of {str(self.file)!r} were trained on another base: "
                    f"{name!r} has other values in {self.task.model_name!r} now. Nothing was "
                    "written. Put the files back that were there, or name them by a revision. "
                    "(model)"
                )
        return tensor


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _with_stand_ins(network: nn.Module) -> Any:
    """Put a tensor of the same shape, whose values all are one zero, in each parameter's place."""
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(module, HeldTensors):
                continue
            if id(parameter) not in made:
                zero = torch.zeros((), dtype=parameter.dtype)
                small = parameter.dim() < 2  # biases: they are written into where they train
                value = zero.repeat(parameter.shape) if small else zero.expand(parameter.shape)
                made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
    return network
