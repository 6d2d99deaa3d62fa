"""The bytes of one way to make a run."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule

from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.utilities._torch import fake_tensors
from lora_lightning.verbs.plan.batch import BatchShape, answers, batch_of
from lora_lightning.verbs.plan.optimizers import Optimizers
from lora_lightning.verbs.plan.placement import Placement, placements
from lora_lightning.verbs.plan.run_length import RunLength
from lora_lightning.verbs.plan.step import Asked, resident_bytes, step_peaks
from lora_lightning.verbs.plan.subject import Subject, subject_of


@dataclass
class Estimate:
    """What one way to make the run needs on one device.

    Attributes:
        subject: The module with its adapters.
        resident: Bytes of base, adapters, gradients and optimizer.
        state: Bytes of each tensor of the optimizer's state.
        moments: Of each phase of a step, the bytes of the rest at its worst moment.
        unknown: Why `moments` is empty; "" where it is not.

    """

    subject: Subject
    resident: Counter[str]
    state: list[int]
    moments: dict[str, Counter[str]]
    unknown: str = ""

    def placed(self, devices: int) -> dict[str, Placement]:
        """On one device, and on several, by strategy."""
        return placements(self.resident, self.moments, self.subject, devices)


@dataclass
class Run:
    """What is asked for.

    Attributes:
        module: As it was given.
        callbacks: Those with adapters.
        precision: The Trainer's.
        device: Kind of device.
        found: What is known of the data.

    """

    module: LightningModule
    callbacks: Sequence[AdapterCallback]
    precision: str
    device: str
    found: RunLength = field(default_factory=RunLength)
    _made: dict[Any, Subject] = field(default_factory=dict)

    def subject(self, **changes: Any) -> Subject:
        """The module without memory, made once; `changes` of a task's options."""
        key = tuple(sorted(changes.items()))
        if key not in self._made:
            self._made[key] = self._subject(changes)
        return self._made[key]

    def _subject(self, changes: dict[str, Any]) -> Subject:
        module = self.module
        if changes and isinstance(module, PretrainedTask):
            module = copy.copy(module)
            module._modules = {**module._modules, "network": None}
            module.options = dataclasses.replace(module.options, **changes)
        return subject_of(module, self.callbacks, self.precision, fake_tensors())

    def estimate(self, subject: Subject, shape: BatchShape) -> Estimate:
        """Count what lives all the time, and follow one step."""
        optimizers = Optimizers(self.callbacks)
        try:
            resident, state = resident_bytes(subject, optimizers)
        except Exception as error:  # of an optimizer that anybody may have written
            optimizers.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            resident, state = resident_bytes(subject, optimizers)
        if optimizers.reason:
            subject.notes.append(
                "the module's own optimizer cannot be had without a run "
                f"({optimizers.reason}): planned is AdamW"
            )
        done = Estimate(subject, resident, state, {})
        own = not isinstance(subject.module, PretrainedTask)
        if own and self.found.first_batch is None:
            done.unknown = self.found.reason or "there is no batch"
            return done

        def make_batch() -> Any:
            return batch_of(subject.module, shape, self.found, self.precision)

        said = logging.getLogger("torch._subclasses.fake_tensor")  # of each failure, at length
        level = said.level
        said.setLevel(logging.CRITICAL)
        try:
            asked = Asked(make_batch, optimizers, self.precision, self.device, answers(shape))
            done.moments = step_peaks(subject, asked)
        except Exception as error:  # of a module that anybody may have written
            done.unknown = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            said.setLevel(level)
        return done
