"""What a plan says, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from lora_lightning.training.messages import as_html, rendered, show
from lora_lightning.training.summary import readable_bytes
from lora_lightning.verbs.plan.changes import Change
from lora_lightning.verbs.plan.placement import Placement


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        title: What is planned.
        parameters: Of the module, adapters included.
        trainable: Those that train.
        base_bytes: The base as it is held, quantised or not, with its buffers.
        adapter_bytes: Adapters and trained copies.
        gradient_bytes: Of what trains.
        optimizer_bytes: The optimizer's state.
        activation_bytes: What forward keeps for backward; None where it is not known.
        loss_head_bytes: What the loss of a language model takes while it is computed.
        peak_bytes: On each device, when most lives; of what is known.
        unknown: Why activations are not known; "" where they are.
        adapter_file_bytes: Tensors of the adapter in files.
        checkpoint_bytes: Tensors of a checkpoint with optimizer state.
        steps: Of the optimizer, in the whole run; None where that is not known.
        tokens: Of the whole run, padding left out.
        placements: One device, DDP, FSDP2.
        placement: The one that is asked for.
        memory_bytes: Of a device.
        changes: What would need less.
        notes: What the figures do not hold for.

    """

    title: str
    parameters: int
    trainable: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    loss_head_bytes: int
    unknown: str
    adapter_file_bytes: int
    checkpoint_bytes: int
    steps: int | None
    tokens: int | None
    placements: tuple[Placement, ...]
    placement: Placement
    memory_bytes: int
    memory_name: str
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    targets: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def peak_bytes(self) -> int:
        """On each device, when most lives; of what is known."""
        return self.placement.peak

    @property
    def fits(self) -> bool:
        """Whether that is no more than the device has."""
        return self.peak_bytes <= self.memory_bytes

    def table(self) -> Table:
        """Bytes on each device, by what they are for."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("on each device")
        for placement in self.placements:
            table.add_column(placement.name, justify="right")
        names = dict.fromkeys(name for p in self.placements for name in p.parts)
        for name in names:
            cells = [readable_bytes(p.parts[name]) if name in p.parts else "-"
                     for p in self.placements]  # fmt: skip
            table.add_row(_NAMES.get(name, name), *cells)
        table.add_section()
        what = "peak of a step" if not self.unknown else "without activations"
        table.add_row(what, *(readable_bytes(p.peak) for p in self.placements))
        return table

    def lines(self) -> list[str]:
        """What stands below the table; the verdict last."""
        share = self.trainable / max(self.parameters, 1)
        lines = [f"trainable {self.trainable:,} of {self.parameters:,} parameters ({share:.2%})"]
        if self.loss_head_bytes:
            lines.append(f"loss head: {readable_bytes(self.loss_head_bytes)} while it is computed")
        if self.unknown:
            lines.append(f"activations are not known: {self.unknown}")
        files = readable_bytes(self.adapter_file_bytes)
        lines.append(
            f"adapter on disk {files}; checkpoint with optimizer state "
            f"{readable_bytes(self.checkpoint_bytes)}"
        )
        if self.steps is not None:
            tokens = "" if self.tokens is None else f", {self.tokens:,} tokens"
            lines.append(f"the run: {self.steps:,} optimizer steps{tokens}")
        lines += self.notes
        return [*lines, *self._verdict()]

    def _verdict(self) -> list[str]:
        memory, peak = self.memory_bytes, self.peak_bytes
        if self.fits:
            spare = readable_bytes(memory - peak)
            if self.unknown:
                return [f"without activations {readable_bytes(peak)} of {self.memory_name}"]
            verdict = f"fits in {self.memory_name} with {spare} to spare"
        else:
            verdict = f"does not fit: needs {readable_bytes(peak)} of {self.memory_name}"
        lines = [f"  with {c.text}: {readable_bytes(c.peak)}{self._fits(c)}" for c in self.changes]
        return [verdict, *lines]

    def _fits(self, change: Change) -> str:
        return ", fits" if not self.fits and change.peak <= self.memory_bytes else ""

    def show(self) -> None:
        """Print it."""
        show(*self._parts())

    def __str__(self) -> str:
        return rendered(*self._parts())

    def _repr_html_(self) -> str:
        return as_html(*self._parts())

    def _parts(self) -> list[Any]:
        return [*self.targets, self.table(), *self.lines()]


_NAMES = {"backward": "backward's own", "step": "optimizer's step", "batch": "the batch"}
