"""Selection by "all-linear" and "all-layers", which name no module: what they take and leave out.

They leave out the output heads of transformers models, submodules that the user froze (a teacher,
a feature extractor), and layers whose forward returns no tensor. Where nothing that could be
adapted is free to train, being frozen tells nothing: so a base is that somebody froze as a whole
before it got adapters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from lora_lightning.adapters.config import ALL_LAYERS, ALL_LINEAR, AdapterConfig
from lora_lightning.adapters.registry import classes_for
from lora_lightning.engine.freezing import frozen_by_user
from lora_lightning.engine.targets import checks
from lora_lightning.engine.targets.embeddings import output_heads
from lora_lightning.engine.targets.hints import kinds_in, shown_name
from lora_lightning.engine.targets.matching import is_excluded
from lora_lightning.engine.targets.outputs import output_obstacle
from lora_lightning.errors import TargetError, first_few
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.conv1d import is_conv1d
from lora_lightning.layers.registry import SUPPORTED, layer_type_for


@dataclass
class LeftOut:
    """What a default selection leaves alone.

    Attributes:
        heads: Paths of output heads.
        frozen: The submodules that the user froze, outermost, with the layers in them that would
            have been adapted.
        unfit: Reasons by the path of layers of the wanted kind that cannot carry the adapter.
        kinds: How many layers of other kinds could carry it, by class.

    """

    heads: list[str] = field(default_factory=list)
    frozen: dict[str, list[str]] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A line for frozen submodules and for other kinds, with what takes them in."""
        lines = []
        if self.frozen:
            names = dict.fromkeys(shown_name(p) for paths in self.frozen.values() for p in paths)
            lines.append(
                f"frozen before adapters came, and not trained: {first_few(self.frozen)}; to adapt "
                f"it, name its layers, target_modules: [{first_few(names)}] (lora.target_modules)"
            )
        if self.kinds:
            counts = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
            lines.append(
                f"left out by {ALL_LINEAR!r}: {counts}; target_modules: {ALL_LAYERS} takes them, "
                "too (lora.target_modules)"
            )
        return lines


def select_by_default(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: AdapterConfig,
    taken: Iterable[str],
    obstacles: dict[str, str],
) -> tuple[dict[str, nn.Module], LeftOut]:
    """The modules that "all-linear" or "all-layers" selects, by path, and what it leaves out.

    Args:
        model: The model.
        modules: Its modules by path.
        config: Options; `target_modules` is one of the two.
        taken: Paths of tables and heads whose weight trains otherwise (token rows).
        obstacles: Reasons why attentions cannot carry adapters, by path.

    Raises:
        TargetError: If nothing is left to adapt.

    """
    heads, left_out = output_heads(model), LeftOut()
    adaptable: dict[str, _Layer] = {}
    for path, layer in _layers(modules, config).items():
        if path in obstacles or path in taken:
            continue
        if is_within(path, heads):
            left_out.heads += [path] if layer.is_wanted else []
        elif reason := output_obstacle(layer.module) or _tied_table(path, layer.module, modules):
            left_out.unfit |= {path: reason} if layer.is_wanted else {}
        else:
            adaptable[path] = layer
    free = {path: layer for path, layer in adaptable.items() if not is_excluded(config, path)}
    frozen = frozen_by_user(model)
    if all(is_within(path, frozen) for path in free):
        frozen = []
    targets = {}
    for path, layer in free.items():
        outer = next((outer for outer in frozen if is_within(path, [outer])), None)
        if layer.is_wanted and outer is None:
            targets[path] = layer.module
        elif layer.is_wanted and outer is not None:
            left_out.frozen.setdefault(outer, []).append(path)
        elif layer.can_carry and outer is None:
            module = layer.module
            kind = module.base_type if isinstance(module, AdaptedLayer) else type(module)
            left_out.kinds[kind.__name__] = left_out.kinds.get(kind.__name__, 0) + 1
    if not targets:
        wanted = [path for path, layer in adaptable.items() if layer.is_wanted]
        _refuse(model, modules, wanted, config, left_out)
    return targets, left_out


class _Layer(NamedTuple):
    module: nn.Module
    can_carry: bool  # an adapter of the config's type
    is_wanted: bool  # by what target_modules says


def _layers(modules: dict[str, nn.Module], config: AdapterConfig) -> dict[str, _Layer]:
    """The modules of a kind that an adapter of some type can sit on, by path."""
    found = {}
    for path, module in modules.items():
        layer_type = layer_type_for(module)
        if layer_type is not None:
            can_carry = layer_type.kind in classes_for(config)
            linear = isinstance(module, nn.Linear) or is_conv1d(module)
            wanted = linear if config.target_modules == ALL_LINEAR else can_carry
            found[path] = _Layer(module, can_carry, wanted)
    return found


def is_within(path: str, others: Iterable[str]) -> bool:
    """True if `path` is one of `others`, or inside one of them."""
    return any(path == other or path.startswith(other + ".") for other in others)


def _tied_table(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """Why an embedding that shares its weight is left alone: an adapter there cannot be merged."""
    if isinstance(module, nn.Embedding):
        for other, owner in modules.items():
            if other != path and any(p is module.weight for p in owner._parameters.values()):
                return f"its weight is that of {other}, too"
    return None


def _refuse(
    model: nn.Module,
    modules: dict[str, nn.Module],
    candidates: list[str],
    config: AdapterConfig,
    left_out: LeftOut,
) -> None:
    more = "".join(f"\n  {line}" for line in left_out.lines())
    checks.check_something_is_left(candidates, config, more)
    reasons = [f"{path} ({reason})" for path, reason in left_out.unfit.items()]
    unfit = f" Left out: {first_few(reasons)}." if reasons else ""
    raise TargetError(
        f"target_modules {config.target_modules!r} matched nothing: "
        f"{kinds_in(model, modules)}.{unfit} "
        f"Adaptable kinds: {SUPPORTED}; name modules explicitly. (lora.target_modules){more}"
    )
