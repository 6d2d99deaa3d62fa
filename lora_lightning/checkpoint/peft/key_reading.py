"""Which module and which tensor each key of a file stands for.

PEFT writes `base_model.model.<path of the module>.<tensor>`. Trainers that save a state dict of
their own leave more in the keys: what wrapped the model, the adapter's name behind `lora_A`, PEFT's
prefix not at all or twice. And the folder of a pretrained model is also read for a module around
it. Keys that do not fit as PEFT writes them are read in the one way in which all of them name
something in the model; where there is none, or more than one, the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lora_lightning.checkpoint.peft.base_model import Target, is_pretrained, pretrained_inside
from lora_lightning.checkpoint.peft.keys import PREFIX
from lora_lightning.errors import AdapterMismatchError, did_you_mean, first_few
from lora_lightning.layers.traversal import walk
from lora_lightning.utilities.wrappers import plain_name

# What may stand before a key: PEFT's own prefix, and what DDP, DeepSpeed and Fabric put there.
_AROUND = (PREFIX, "module.", "_forward_module.")
# PEFT's names of tensors, alone and before an adapter's name.
_TENSOR = r"\.(?:lora|hada|lokr|oft|vera|ia3|shira|trainable_tokens)_\w+"
_PLAIN = re.compile(rf"{_TENSOR}(\.weight|\.bias)?$")
_NAMED = re.compile(rf"({_TENSOR})\.([^.]+?)(\.weight|\.bias)?$")


class Place(NamedTuple):
    """Attributes: the key in PEFT's files, with the first name of every module; path; tensor."""

    key: str
    path: str
    tensor: str


@dataclass
class Reading:
    """One way to read a file.

    Attributes:
        target: The model that its names are of: the one that is to be loaded, or one inside it.
        modules: The modules of that one, by path.
        places: What each key stands for.
        shared: The key in PEFT's files of what all modules share, by key.

    """

    target: Target
    modules: dict[str, nn.Module]
    places: dict[str, Place]
    shared: dict[str, str]
    _given: _Places

    def outside(self, name: str) -> str:
        """The name that what `target` calls `name` has in the model that is to be loaded."""
        return self._given.first_name(self.target.prefix + name)


def read_keys(
    model: nn.Module, keys: Collection[str], shared: frozenset[str], made_for: str, where: str
) -> Reading:
    """The one reading of `keys` for `model`; of modules, but for those in `shared`.

    Of several, that for the model inside which has the path `made_for`.

    Raises:
        AdapterMismatchError: If there is none, or more than one.

    """
    names = {key: plain_name(key) for key in keys}
    targets = [Target(model, "")]
    if not is_pretrained(model):
        targets += pretrained_inside(model)
    looked_up = [(target, _Places(target.model)) for target in targets]
    (_, given), *_ = looked_up
    for spelt in _spellings(names):
        common = _common(spelt, shared)
        fitting: dict[tuple[str, ...], Reading] = {}
        for around, rest in _stripped({k: n for k, n in spelt.items() if k not in common}):
            for target, in_model in looked_up:
                places = in_model.of(rest)
                if places is None:
                    continue
                reading = Reading(target, in_model.modules, places, common, given)
                if around == PREFIX and not target.prefix:
                    return reading  # as PEFT writes it
                names_of = (place.key.removeprefix(PREFIX) for place in places.values())
                outcome = tuple(map(reading.outside, names_of))
                fitting.setdefault(outcome, reading)
        meant = [way for way in fitting.values() if way.target.prefix == f"{made_for}."]
        if len(meant) == 1 or len(fitting) == 1:
            return [*meant, *fitting.values()][0]
        if fitting:
            raise AdapterMismatchError(_several_ways(model, [*fitting.values()], where))
    common = _common(names, shared)
    raise AdapterMismatchError(
        _nothing_fits(model, {k: n for k, n in names.items() if k not in common}, where)
    )


def _common(names: dict[str, str], shared: frozenset[str]) -> dict[str, str]:
    """The one of `shared` that stands at the end of a name, by key."""
    return {k: s for k, n in names.items() for s in shared if f".{n}".endswith(f".{s}")}


def _spellings(names: dict[str, str]) -> Iterator[dict[str, str]]:
    """`names` without the adapter's name, where all tensors have the same one; as they are."""
    named = [match for match in map(_NAMED.search, names.values()) if match]
    adapter_names = {match[2] for match in named} - {"weight", "bias"}
    if len(adapter_names) == 1 and not any(map(_PLAIN.search, names.values())):
        (name,) = adapter_names
        bare = re.compile(rf"(?:({_TENSOR})|\.modules_to_save)\.{re.escape(name)}(?=\.|$)")
        yield {
            key: bare.sub(r"\1", n).replace("magnitude_vector.weight", "magnitude_vector")
            for key, n in names.items()
        }
    yield names


def _stripped(names: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(what is taken off before all `names`, the rest of each); first PEFT's own prefix."""
    around, found = "", [("", names)]
    rest = names
    while True:
        part = next((p for p in _AROUND if all(n.startswith(p) for n in rest.values())), None)
        if part is None or not rest:
            break
        around += part
        rest = {key: name.removeprefix(part) for key, name in rest.items()}
        found.append((around, rest))
    yield from sorted(found, key=lambda way: way[0] != PREFIX)


class _Places:
    """Looks names up in a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {path: module for path, module in walk(model) if path}
        first_names = {id(module): path for path, module in self.modules.items()}
        self.aliases = {
            alias: first_names[id(module)]
            for alias, module in model.named_modules(remove_duplicate=False)
            if first_names.get(id(module), alias) != alias
        }

    def of(self, names: dict[str, str]) -> dict[str, Place] | None:
        """The place of each of `names`, by key; None where one of them has none."""
        places = {}
        for key, name in names.items():
            place = self.find(name)
            if place is None:
                return None
            places[key] = place
        return places

    def find(self, name: str) -> Place | None:
        name = self.first_name(name)
        path, tensor = self._owner(name)
        if path not in self.modules or not _may_hold(self.modules[path], tensor):
            return None
        return Place(PREFIX + name, path, tensor)

    def first_name(self, name: str) -> str:
        """`name` with the path that `walk` gives to a module that has several."""
        parts = name.split(".")
        for length in range(len(parts) if self.aliases else 0, 0, -1):
            path = self.aliases.get(".".join(parts[:length]))
            if path is not None:
                return ".".join([path, *parts[length:]])
        return name

    def _owner(self, name: str) -> tuple[str, str]:
        """(deepest module whose path begins `name`, the rest of it), without PEFT's wrappers."""
        parts = name.split(".")
        path = ""
        for i, part in enumerate(parts):
            inner = f"{path}.{part}" if path else part
            if inner in self.modules:
                path = inner
            elif part != "base_layer" and parts[i : i + 2] != ["token_adapter", "base_layer"]:
                return path, ".".join(parts[i:])
        return path, ""


def _may_hold(module: nn.Module, tensor: str) -> bool:
    """True if `tensor` can be a name below `module` itself, and not below a child that is missing.

    Adapters' tensors have names of one or two parts, behind that of one of several weights.
    """
    first, _, rest = tensor.partition(".")
    name = rest if rest and first in own_tensors(module) else tensor
    return bool(name) and name.count(".") < 2


def own_tensors(module: nn.Module) -> set[str]:
    """Names of the module's own parameters and buffers."""
    return {*module._parameters, *module._buffers}


def _several_ways(model: nn.Module, readings: list[Reading], where: str) -> str:
    ways = [r.target.prefix + next(iter(r.places.values())).path for r in readings]
    inside = next((r.target.prefix[:-1] for r in readings if r.target.prefix), "PATH")
    return (
        f"The names in {where} fit this {type(model).__name__} in {len(ways)} ways: the first of "
        f"them as {' or as '.join(map(repr, ways[:3]))}. Load the adapter onto the part that it "
        f"was made for: load_adapter(model.{inside}, ...). (lora.module)"
    )


def _nothing_fits(model: nn.Module, names: dict[str, str], where: str) -> str:
    """What is in the way of reading `names`."""
    look_up = _Places(model)
    _, names = max(_stripped(names), key=lambda way: len(way[0]))
    own = [name.removeprefix(PREFIX) for name in names.values()]
    parts = own[0].split(".")
    kind = type(model).__name__
    for length in range(1, min(len(parts), 20)):
        around = ".".join(parts[:length]) + "."
        inside = {n: n.removeprefix(around) for n in own if n.startswith(around)}
        if len(inside) == len(own) and look_up.of(inside) is not None:
            return (
                f"The names in {where} begin with {around!r}, which is in the way: without it all "
                f"of them fit this {kind}. The adapter is of a model that holds this one as "
                f"{around[:-1]!r}; load it onto that model, or take {around!r} off the names."
            )
    for path in look_up.modules:
        if look_up.of({n: f"{path}.{n}" for n in own}) is not None:
            return (
                f"The names in {where} fit this {kind} only with '{path}.' before them: the "
                f"adapter is of a model inside this one. Load it there: load_adapter(model.{path}, "
                "...). (lora.module)"
            )
    lost = [n for n in own if look_up.find(n) is None]
    path = re.split(_TENSOR, lost[0])[0]
    if path in look_up.modules:
        return (
            f"{where} holds tensors that this model does not have a place for: "
            f"{first_few(lost, 3)}. It has the module {path!r}, but no adapter has tensors of "
            "that name."
        )
    near = did_you_mean(path, look_up.modules)
    hint = f" Nearest module: {near!r}." if near else ""
    return (
        f"{where} holds tensors for modules that this model does not have: {first_few(lost, 3)}."
        f"{hint} Is it an adapter of another model, or of one around or inside this one?"
    )
