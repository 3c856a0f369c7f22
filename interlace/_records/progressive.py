"""ProgressiveRecord: what became of every stage of a progressive run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from interlace._coerce import Checked
from interlace._records.base import Record


@dataclass(frozen=True)
class StageRecord(Checked):
    """One stage; all layers count in the first model.

    Attributes:
        number: 1 for the first.
        drop: tower -> layers that this stage dropped, in selection order.
        gone: tower -> layers that this stage and those before it dropped.
        steps: optimiser steps of its healing.
        num_samples: samples it was healed with, repeats counted.
        tokens: tokens it was healed with, padding left out.
        retention: what it kept of the dense model, by the guard's measure.
        kept: False for a stage that was rolled back.
        plan_fingerprint: of the plan that leads from the dense model to this stage.
        parts: tower -> place in a layer -> kept layers that lost it whole.
        units: tower -> place in a layer -> query heads, or neurons, that all kept layers lost.
    """

    number: int
    drop: dict[str, tuple[int, ...]]
    gone: dict[str, tuple[int, ...]]
    steps: int
    num_samples: int
    tokens: int
    retention: float
    kept: bool
    plan_fingerprint: str
    parts: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    units: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def gone_text(self) -> str:
        """What is gone after this stage, in words."""
        said = [
            f"{len(layers)} {tower} layer{'s' * (len(layers) > 1)}"
            for tower, layers in self.gone.items()
            if layers
        ]
        for tower, places in self.parts.items():
            said += [f"{name} of {len(layers)} {tower} layers" for name, layers in places.items()]
        for tower, counts in self.units.items():
            said += [f"{count} units of {tower} {name}" for name, count in counts.items()]
        return f"{', '.join(said)} gone"


@dataclass(frozen=True)
class ProgressiveRecord(Record):
    """The stages of a progressive run, and how it ended.

    Attributes:
        stages: every stage that was carried out, one that was rolled back included.
        guard: what was measured after every stage.
        min_retention: retention below which a stage is rolled back; None where none was stated.
        stopped: why the run ended before its last stage, in words; empty where it did not.
        model_name: name or path the dense model was opened by.
        settings: the settings of the run (any JSON values).
    """

    kind: ClassVar[str] = "progressive"

    stages: tuple[StageRecord, ...]
    guard: str = "loss"
    min_retention: float | None = None
    stopped: str = ""
    model_name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
