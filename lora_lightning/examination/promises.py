"""One promise a function: what is compared with what, and the words for where it breaks."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch import Callback
from torch import Tensor

from lora_lightning.errors import first_few
from lora_lightning.examination.fresh_process import (
    CannotBeSent,
    Evaluations,
    evaluated_by_path,
    evaluated_in_fresh_process,
    loaded_run,
)
from lora_lightning.examination.recipe import Recipe, Run
from lora_lightning.examination.runs import Runs
from lora_lightning.examination.state import Values, described, differences, same, tensors
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.module_state import defines_hook

Verdict = tuple[bool | None, str]

_NOTHING = "no validation, test or predict step with data"


def starts_as_the_base(runs: Runs) -> Verdict:
    """The module evaluates to the same before any training, with adapters and without."""
    found = {stage: _evaluated_fresh(runs.recipe, stage) for stage in runs.of_base}
    holds, reason = _equal(runs, runs.of_base, found)
    if holds is False and any(map(_starts_otherwise, runs.recipe.callbacks)):
        return None, "the adapter starts otherwise, as was asked for (init_lora_weights, init_from)"
    if holds is False and _equal(runs, runs.of_base_unfused, found)[0]:
        return True, (
            "but for rounding: adapters keep torch from its fused kernels for attention in eval "
            f"mode ({reason})"
        )
    return holds, reason


def base_untouched(runs: Runs) -> Verdict:
    """With adapters disabled, all is as in a fresh module, but for what the module moves itself."""
    untouched, base = runs.untouched, runs.base
    gone = sorted(untouched.keys() - base.keys())
    moved = [n for n in untouched if n in base and not _is_cast(untouched[n], base[n])]
    if gone:
        return False, f"no longer there: {first_few(gone)}"
    if not moved:
        return True, f"all {len(untouched)} tensors as in a fresh module, bit for bit"
    try:
        own = runs.own_moves
    except Exception as error:  # of the user's module
        return None, (
            f"{_sized(moved, base)} moved. Whether the module moves them itself cannot be told: "
            f"without adapters it does not train ({in_words(error)})"
        )
    foreign = [name for name in moved if name not in own]
    if foreign:
        return False, f"moved, though not by the module itself: {_sized(foreign, base)}"
    return True, f"the module itself moves {_sized(moved, base)}; all else as in a fresh module"


def moves_still_move(runs: Runs) -> Verdict:
    """What the module itself moves without adapters, it moves with them, or their adapters.

    Each of its children as a whole: a teacher's copies of what does not train have no cause to.
    """
    parameters = {*runs.untouched} & {name for name, _ in runs.alone.module.named_parameters()}
    own = sorted(runs.own_moves & parameters)
    moving = {name.partition(".")[0] for name in runs.moved & {*parameters, *runs.adapted}}
    still = [name for name in own if name.partition(".")[0] not in moving]
    if still:
        return None, (
            f"without adapters the module itself moves {_sized(still, runs.untouched)}, here it "
            "does not: if it is to follow what trains, it does not"
        )
    return True, _sized(own, runs.untouched) if own else "the module moves no parameter itself"


def gradients_arrive(runs: Runs) -> Verdict:
    """Every trained parameter has had a gradient that is not zero."""
    reached = runs.gradients.reached
    never = [name for name, arrived in reached.items() if not arrived]
    if not reached:
        return False, "in no step: any parameter"
    if not never:
        return True, f"{len(reached)} parameters"
    plain = runs.plain_gradients
    owners = {name: name.partition(".adapters.")[0] for name in never}
    here = {n: [g for m, g in plain.items() if m.startswith(f"{o}.")] for n, o in owners.items()}
    alone = [name for name in never if here[name] and not any(here[name])]
    missing = [name for name in never if name not in alone]
    if missing:
        return False, f"in no step: {first_few(missing)}"
    modules = first_few(dict.fromkeys(owners[name] for name in alone))
    return True, f"{len(reached)} parameters; in none of {modules}, as without adapters"


def optimizers_exact(runs: Runs) -> Verdict:
    """The optimizers hold what requires gradients, each once, and nothing more."""
    probe = runs.optimizers
    words = {"twice in one": probe.twice, "in none": probe.missing, "beside": probe.more}
    wrong = [f"{what}: {first_few(names)}" for what, names in words.items() if names]
    if wrong:
        return False, "; ".join(wrong)
    of_base = [name for name in probe.held if name in runs.untouched]
    trained = f", of them of the base: {first_few(of_base)}" if of_base else ""
    paths = dict.fromkeys(name.partition(".adapters.")[0] for name in probe.left_out)
    left = f"; none of {first_few(paths)}, which the module's optimizers leave out" if paths else ""
    return True, f"{len(probe.held)} parameters{trained}{left}"


def checkpoint_complete(runs: Runs) -> Verdict:
    """All that differs from a fresh module is in the file with its value; no other parameter is."""
    state: Mapping[str, Tensor] = runs.content(runs.after_epochs()[-1])["state_dict"]
    trained, untouched = runs.trained, runs.untouched
    changed = [n for n in trained if n not in untouched or not _is_cast(untouched[n], trained[n])]
    missing = [n for n in changed if not _is_in(trained[n], n, state)]
    parameters = {name for name, _ in runs.saved.module.named_parameters()}
    unchanged = parameters & untouched.keys() - {*changed}
    more = [n for n in unchanged & state.keys() if _is_cast(untouched[n], state[n])]
    if missing:
        return False, f"not in it: {_sized(missing, trained)}"
    if more:
        return False, f"in it, though unchanged: {_sized(more, trained)}"
    return True, f"{len(changed)} of {len(trained)} tensors changed, and are in it"


def saving_changes_nothing(runs: Runs) -> Verdict:
    """The run that saves after every step ends as the one that never does."""
    return _as_expected(runs, runs.saved_end)


def resumes_after_epoch(runs: Runs) -> Verdict:
    """Go on from the checkpoint after the first epoch, under another global seed."""
    return _as_expected(runs, runs.resumed(runs.after_epochs()[0]))


def resumes_within_epoch(runs: Runs) -> Verdict:
    """Go on from the last epoch after an even and an odd number of steps, under another seed."""
    checkpoints = runs.within_epoch()
    if not checkpoints:
        return None, "an epoch has one optimizer step, and so no middle"
    verdicts = [_as_expected(runs, runs.resumed(checkpoint)) for checkpoint in checkpoints]
    return next((verdict for verdict in verdicts if not verdict[0]), verdicts[0])


def evaluates_by_path(runs: Runs) -> Verdict:
    """By `ckpt_path`, on the Trainer and module of the run and on fresh ones, as in memory."""
    expected, checkpoint = runs.in_memory, runs.after_epochs()[-1]
    by_path = evaluated_by_path(runs.recipe, checkpoint, [*expected])
    holds, reason = _equal(runs, expected, by_path)
    if not holds:
        return holds, reason
    holds, reason = _equal(runs, expected, runs.evaluated(runs.saved, checkpoint))
    return holds, reason if holds else f"on the Trainer and module of the run: {reason}"


def evaluates_in_fresh_process(runs: Runs) -> Verdict:
    """By `ckpt_path` in another process, as in memory."""
    expected, checkpoint = runs.in_memory, runs.after_epochs()[-1]
    if not expected:
        return None, _NOTHING
    try:
        found = evaluated_in_fresh_process(runs.recipe, checkpoint, [*expected])
    except CannotBeSent as reason:
        return None, str(reason)
    return _equal(runs, expected, found)


def loads_from_checkpoint(runs: Runs) -> Verdict:
    """`load_from_checkpoint` makes the trained module, which evaluates as in memory."""
    expected, checkpoint = runs.in_memory, runs.after_epochs()[-1]
    kind = type(runs.saved.module)
    try:
        run = loaded_run(runs.recipe, checkpoint)
    except Exception as error:
        if defines_hook(runs.saved.module, "setup"):
            return None, (
                "where setup() builds layers, load_from_checkpoint has none: Lightning calls only "
                f"configure_model() there ({in_words(error)})"
            )
        arguments = [*inspect.signature(kind.__init__).parameters][1:]  # without `self`
        unsaved = [name for name in arguments if name not in runs.saved.module.hparams]
        if not isinstance(error, TypeError) or not unsaved:
            raise
        return None, (
            f"{kind.__name__} does not save {first_few(unsaved)}: call "
            "self.save_hyperparameters() in __init__, or give what is missing to "
            f"load_from_checkpoint ({in_words(error)})"
        )
    found = tensors(run.module)
    wrong = [
        name
        for name in {**runs.trained, **found}
        if name not in found
        or name not in runs.trained
        or not _is_cast(found[name], runs.trained[name])
    ]
    if wrong:
        return False, f"other values: {described(wrong, runs.trained, found)}"
    if not expected:
        return True, "all tensors as in memory"
    holds, reason = _equal(runs, expected, runs.evaluated(run))
    kinds = {t.dtype for t in runs.trained.values()} - {t.dtype for t in found.values()}
    if holds is False and kinds:
        return None, (
            f"all tensors are cast copies of those in memory, {first_few(sorted(map(str, kinds)))} "
            f"there by the Trainer's precision, which nobody knows here; so {reason}"
        )
    return holds, reason


PROMISES: dict[str, Callable[[Runs], Verdict]] = {
    "starts as the base": starts_as_the_base,
    "base untouched": base_untouched,
    "what moves still moves": moves_still_move,
    "gradients reach every adapter": gradients_arrive,
    "optimizers hold exactly what trains": optimizers_exact,
    "checkpoint complete": checkpoint_complete,
    "saving changes nothing": saving_changes_nothing,
    "resume at an epoch's end": resumes_after_epoch,
    "resume within an epoch": resumes_within_epoch,
    "evaluation by ckpt_path": evaluates_by_path,
    "evaluation in a fresh process": evaluates_in_fresh_process,
    "load_from_checkpoint": loads_from_checkpoint,
}


def _evaluated_fresh(recipe: Recipe, stage: str) -> dict[str, object]:
    return recipe.evaluate(Run(recipe.trainer(), recipe.module()), stage)


def _starts_otherwise(callback: Callback) -> bool:
    if not isinstance(callback, AdapterCallback):
        return False
    config = callback.config
    drawn = [config.to_dict().get(name) for name in ("init_lora_weights", "init_weights")]
    return bool(callback.init_from) or config.starts_from_base or False in drawn


def _as_expected(runs: Runs, found: Values) -> Verdict:
    wrong = differences(runs.expected, found)
    if not wrong:
        return True, f"{len(found)} values as of a run that was neither interrupted nor saved"
    shown = described(wrong, runs.expected, found)
    by_itself = set(runs.undetermined)
    if any(not name.startswith("metric ") for name in by_itself):
        return None, (
            "two uninterrupted runs from the same seed differ, too, in "
            f"{first_few(sorted(by_itself), 3)}; this one differs in {shown}"
        )
    if by_itself >= {*wrong}:  # a time, say
        return True, f"{len(found)} values, but for what no two runs have alike: {shown}"
    return False, f"{len(wrong)} of {len(found)} values differ: {shown}"


def _equal(runs: Runs, expected: Evaluations, found: Evaluations) -> Verdict:
    if not expected:
        return None, _NOTHING
    wrong = {stage: differences(values, found[stage]) for stage, values in expected.items()}
    told = [f"{s}: {described(n, expected[s], found[s])}" for s, n in wrong.items() if n]
    if not told:
        return True, ", ".join(expected)
    alike = all({*names} <= runs.by_chance(stage) for stage, names in wrong.items())  # a time, say
    return alike, ("but for what no two evaluations have alike: " if alike else "") + "; ".join(
        told
    )


def _is_cast(before: Tensor, after: Tensor) -> bool:
    """Nothing but a cast lies between them, as a precision like bf16-true makes it."""
    return same(before.to(after.dtype), after) or same(before, after.to(before.dtype))


def _is_in(tensor: Tensor, name: str, state: Mapping[str, Tensor]) -> bool:
    """Under its own name, or under another that its owner gives it."""
    return (name in state and same(state[name], tensor)) or any(
        isinstance(other, Tensor) and same(other, tensor) for other in state.values()
    )


def _sized(names: list[str], values: Mapping[str, Tensor]) -> str:
    count = sum(values[name].numel() for name in names)
    return f"{first_few(names, 3)} ({count:,} numbers)"


def in_words(error: BaseException) -> str:
    """An error in one line: its first, and what that one announces; if it has none, its place."""
    first, _, rest = str(error).strip().partition("\n")
    announced = rest.strip().partition("\n")[0] if first.endswith(":") else ""
    said = f"{first} {announced}".strip()
    frames = traceback.extract_tb(error.__traceback__)
    if not said and frames:
        last = frames[-1]
        said = f"{Path(last.filename).name}, line {last.lineno}, in {last.name}: {last.line}"
    return ": ".join(filter(None, (type(error).__name__, said)))
