"""Selection by `target_parameters`: PEFT's rule, but nothing in silence.

A listed name selects a parameter by its whole name or by the last part(s) of it (PEFT 0.21.2,
`BaseTuner._inject_parameters`). `exclude_modules` and `layers_to_transform` are about modules and
do not narrow it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from lora_lightning.errors import TargetError, did_you_mean, first_few
from lora_lightning.layers.experts import check_parameter


def select_parameters(
    modules: dict[str, nn.Module], wanted: list[str], targets: Iterable[str], saved: Iterable[str]
) -> dict[str, list[str]]:
    """The names of the selected parameters by the path of the module that owns them.

    `targets` are paths that are adapted as modules, `saved` those that train as a copy.

    Raises:
        TargetError: If a name selects nothing, or a parameter that cannot be adapted or that
            another option has already.

    """
    for target in wanted:
        if not matching_parameters(modules, [target]):
            raise TargetError(_nothing_text(target, modules))
    found: dict[str, list[str]] = {}
    for full_name, (path, name) in matching_parameters(modules, wanted).items():
        check_parameter(modules[path], path, name)
        inside = any(f"{path}.".startswith(f"{outer}.") for outer in saved)
        if path in targets or inside:
            raise TargetError(
                f"target_parameters selects {full_name!r}, but "
                f"{'modules_to_save' if inside else 'target_modules'} has {path!r} already. Name "
                "it once. (lora.target_parameters)"
            )
        found.setdefault(path, []).append(name)
    return found


def matching_parameters(
    modules: dict[str, nn.Module], wanted: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """(path of the module, name in it) of every parameter that a listed name fits, by full name."""
    return {
        f"{path}.{name}": (path, name)
        for path, module in modules.items()
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
        if any(f".{path}.{name}".endswith(f".{target}") for target in wanted)
    }


def _nothing_text(target: str, modules: dict[str, nn.Module]) -> str:
    fitting = Counter(
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() in (2, 3)
    )
    near = did_you_mean(target, fitting)
    hint = f" Did you mean {near!r} ({fitting[near]} of them)?" if near else ""
    return (
        f"target_parameters {target!r} matched nothing.{hint}\n  Parameters that can be adapted: "
        f"{first_few(fitting, 12) or 'none'}. (lora.target_parameters)"
    )
