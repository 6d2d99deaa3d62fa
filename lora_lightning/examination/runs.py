"""The runs of an examination, each made when the first promise asks for it."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lora_lightning.engine.switching import disable_adapter
from lora_lightning.examination.fresh_process import Evaluations
from lora_lightning.examination.probes import GradientProbe, MoveProbe, OptimizerProbe
from lora_lightning.examination.recipe import EPOCHS, OTHER_SEED, Recipe, Run, builds_later
from lora_lightning.examination.state import Values, differences, of_run, put_back, tensors

_WHEN: dict[str, dict[str, Any]] = {
    "epochs": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "steps": {"every_n_train_steps": 1},
}


class Runs:
    """A recipe and all that was run of it.

    The truth is independent of what is examined: a fresh module that nothing has touched, runs
    without adapters, and a run that is neither interrupted nor saved.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @cached_property
    def untouched(self) -> dict[str, Tensor]:
        """Every tensor of a fresh module, as soon as its layers are built."""
        module = self.recipe.module()
        if not builds_later(module):
            return tensors(module)
        return self._plain[0].untouched

    @property
    def own_moves(self) -> set[str]:
        """What the module moves by itself, in a run without adapters."""
        probe, _, error = self._plain
        if error is not None:
            raise error
        return probe.moved

    @property
    def plain_gradients(self) -> dict[str, bool]:
        """Which parameter ever had a gradient without adapters."""
        return self._plain[1].reached

    @cached_property
    def _plain(self) -> tuple[MoveProbe, GradientProbe, Exception | None]:
        probes = MoveProbe(), GradientProbe()
        try:
            self.recipe.fit(*probes, adapted=False)
        except Exception as error:  # of the user's module
            return *probes, error
        probes[0].compare()
        return *probes, None

    @cached_property
    def of_base(self) -> Evaluations:
        """What each stage gives for a fresh module without adapters.

        A stage that fails so is none of this module's and these data's.
        """
        return self._of_base()

    @cached_property
    def of_base_unfused(self) -> Evaluations:
        """The same without torch's fused kernels of Transformer layers in eval mode."""
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return self._of_base()
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)

    def by_chance(self, stage: str) -> set[str]:
        """What a stage gives otherwise when it is run once more, before any training."""
        return {*differences(self.of_base[stage], self._of_base_again[stage])}

    @cached_property
    def _of_base_again(self) -> Evaluations:
        return self._of_base()

    def _of_base(self) -> Evaluations:
        found = {}
        for stage in self.recipe.stages():
            run = Run(self.recipe.trainer(adapted=False), self.recipe.module())
            with suppress(Exception):
                found[stage] = self.recipe.evaluate(run, stage)
        return found

    @cached_property
    def _watched(self) -> tuple[Run, GradientProbe, OptimizerProbe]:
        probes = GradientProbe(), OptimizerProbe()
        return self.recipe.fit(*probes), *probes

    @property
    def alone(self) -> Run:
        """The uninterrupted run, which writes nothing."""
        return self._watched[0]

    @property
    def gradients(self) -> GradientProbe:
        """What watched its gradients."""
        return self._watched[1]

    @property
    def optimizers(self) -> OptimizerProbe:
        """What watched its optimizers."""
        return self._watched[2]

    @cached_property
    def expected(self) -> Values:
        """All that the uninterrupted run ends with."""
        return of_run(self.alone)

    @cached_property
    def moved(self) -> set[str]:
        """Every tensor that the uninterrupted run moved, those of adapters as well."""
        before = self.optimizers.at_start
        return {*differences(before, tensors(self.alone.module))}

    @property
    def adapted(self) -> set[str]:
        """Tensors that a fresh module has not."""
        return tensors(self.alone.module).keys() - self.untouched.keys()

    @cached_property
    def undetermined(self) -> list[str]:
        """In what a second uninterrupted run from the same seed ends differently."""
        again = of_run(self.recipe.fit(GradientProbe(), OptimizerProbe()))
        return differences(self.expected, again)

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """Every tensor after the uninterrupted run, with its adapters disabled."""
        with disable_adapter(self.alone.module):
            return tensors(self.alone.module)

    @cached_property
    def saved(self) -> Run:
        """The same run with a checkpoint after every step and after every epoch."""
        return self.recipe.fit(*self._savers("saved"))

    @cached_property
    def saved_end(self) -> Values:
        """All that the saved run ends with; asked for before anything is evaluated."""
        return of_run(self.saved)

    @cached_property
    def trained(self) -> dict[str, Tensor]:
        """Every tensor after the saved run; likewise."""
        return tensors(self.saved.module)

    @cached_property
    def in_memory(self) -> Evaluations:
        """What each stage gives for the module in memory, right after its run."""
        return self.evaluated(self.saved)

    def evaluated(self, run: Run, ckpt_path: Path | None = None) -> Evaluations:
        """What each stage gives, each from the module as it is."""
        found, state = {}, tensors(run.module)
        for stage in self.of_base:
            found[stage] = self.recipe.evaluate(run, stage, ckpt_path)
            put_back(run.module, state)
        return found

    def resumed(self, checkpoint: Path) -> Values:
        """All that a run ends with which goes on from `checkpoint`, under another seed."""
        savers = self._savers(f"resumed from {checkpoint.name}")
        return of_run(self.recipe.fit(*savers, seed=OTHER_SEED, ckpt_path=checkpoint))

    def after_epochs(self) -> list[Path]:
        """Checkpoints after each epoch, in order."""
        assert self.saved.trainer  # they are written by then
        return _in_order(self.recipe.folder / "saved" / "epochs")

    def within_epoch(self) -> list[Path]:
        """Two checkpoints in a row from the middle of the last epoch, as far as it has as many."""
        assert self.saved.trainer
        steps = _in_order(self.recipe.folder / "saved" / "steps")
        of_epoch = len(steps) // EPOCHS
        inside = steps[(EPOCHS - 1) * of_epoch : -1]
        middle = max(of_epoch // 2 - 1, 0)
        return inside[middle : middle + 2]

    def content(self, checkpoint: Path) -> dict[str, Any]:
        """What a checkpoint holds."""
        # Our own, of this moment: it may hold objects, as hyperparameters.
        content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=False)
        return content

    def _savers(self, name: str) -> list[ModelCheckpoint]:
        folder = self.recipe.folder / name
        return [
            ModelCheckpoint(folder / when, "{step}", save_top_k=-1, **options)
            for when, options in _WHEN.items()
        ]


def _in_order(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
