"""Hooks that a resumed run would miss run before the checkpoint is written.

Checkpoints are written inside a hook of a callback, and Lightning resumes after that hook. Of the
turn that it belongs to (`on_train_batch_end` of all callbacks, then of the module) the rest has not
run by then: it is not in the file, and the resumed run does not make up for it. An average that the
module keeps up in its own `on_train_batch_end` would be one update short.

So a checkpoint that is asked for within a turn waits for the rest of it: what comes after runs
first, in its order, and is passed over when Lightning comes to it. Only the writing moves, to where
Lightning itself has it at the end of an epoch: ModelCheckpoint comes last. Other checkpoint
callbacks, which only write, are not run early.

Callbacks tell where a turn stands: their hooks are overridden on the instance. Without a
LoraCallback at work they do what they did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lightning.training._lightning import all_callbacks
from lora_lightning.training.module_state import callbacks_of, module_state, original_hook
from lora_lightning.training.resume.run_state import remember_final_states
from lora_lightning.utilities.is_a import is_a

HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")
_AFTER_MODULE = ("EarlyStopping", "Checkpoint")  # in on_train_epoch_end, as Lightning has it


@dataclass
class Turn:
    """One call of a hook on all callbacks and on the module.

    Args:
        hook: Its name.
        members: Callbacks and module in Lightning's order, each with its own hook.

    """

    hook: str
    members: list[tuple[object, Callable[[], Any]]]
    at: int = -1  # the member that Lightning has come to
    early: set[int] = field(default_factory=set)  # those that ran before a checkpoint

    def next_is(self, member: object) -> bool:
        """Move on to a member; False if its turn is over, or it has none in this one."""
        later = range(self.at + 1, len(self.members))
        self.at = next((i for i in later if self.members[i][0] is member), len(self.members))
        return self.at < len(self.members)

    def run(self) -> None:
        """Run the hook of the member that Lightning has come to, unless it ran early."""
        if self.at not in self.early:
            self.members[self.at][1]()

    def finish(self) -> None:
        """Run what is still to come, but for callbacks that write checkpoints."""
        for index in range(self.at + 1, len(self.members)):
            member, hook = self.members[index]
            if index not in self.early and not is_a(member, "Checkpoint"):
                self.early.add(index)
                hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # the copy of a module is in no turn


@dataclass(eq=False)
class _HookInTurn:
    """The hook of a callback, which says that its turn has come."""

    callback: Callback
    hook: str
    original: Callable[..., Any]

    def __call__(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if callbacks_of(module):
            _run(self.callback, self.hook, trainer, module, args)
        else:
            self.original(trainer, module, *args)


@dataclass(eq=False)
class _AtTheEnd:
    """`on_train_end` of a callback, before the first of which the processes still do the same."""

    callback: Callback
    original: Callable[..., Any]

    def __call__(self, trainer: Trainer, module: LightningModule) -> None:
        if callbacks_of(module):
            remember_final_states(module)
        self.original(trainer, module)


def follow_hooks(trainer: Trainer) -> None:
    """Override the hooks of all callbacks; doing it again changes nothing."""
    for callback in all_callbacks(trainer):
        for hook in HOOKS:
            original = getattr(callback, hook)
            if not isinstance(original, _HookInTurn):
                callback.__dict__[hook] = _HookInTurn(callback, hook, original)
        if not isinstance(callback.on_train_end, _AtTheEnd):
            callback.__dict__["on_train_end"] = _AtTheEnd(callback, callback.on_train_end)


def run_in_turn(module: LightningModule, hook: str, *args: Any) -> None:
    """Run the module's own hook, unless it ran before a checkpoint."""
    if callbacks_of(module):
        _run(module, hook, module.trainer, module, args)
    else:
        original_hook(module, hook)(*args)


def finish_turn(module: LightningModule) -> None:
    """Run what is still to come of the turn under way: the module is about to be saved."""
    turn = module_state(module).turn
    if turn is not None:
        turn.finish()


def _run(
    member: object, hook: str, trainer: Trainer, module: LightningModule, args: tuple[Any, ...]
) -> None:
    state = module_state(module)
    turn = state.turn
    if turn is None or turn.hook != hook or not turn.next_is(member):
        state.turn = turn = Turn(hook, list(_members(hook, trainer, module, args)))
        turn.next_is(member)
    try:
        turn.run()
    except BaseException:
        state.turn = None  # a run that failed is saved as it is
        raise
    if turn.at == len(turn.members) - 1:
        state.turn = None


def _members(
    hook: str, trainer: Trainer, module: LightningModule, args: tuple[Any, ...]
) -> Iterator[tuple[object, Callable[[], Any]]]:
    def hook_of(override: _HookInTurn) -> tuple[object, Callable[[], Any]]:
        return override.callback, lambda: override.original(trainer, module, *args)

    overrides = [getattr(callback, hook) for callback in all_callbacks(trainer)]
    found = [override for override in overrides if isinstance(override, _HookInTurn)]
    after = [
        override
        for override in found
        if hook == "on_train_epoch_end" and is_a(override.callback, *_AFTER_MODULE)
    ]
    own = original_hook(module, hook)
    yield from (hook_of(override) for override in found if override not in after)
    yield module, lambda: own(*args)
    yield from map(hook_of, after)
