"""HealReport: how healing went."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from interlace._records.base import Record
from interlace._records.plan_text import number
from interlace._records.tables import plain_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Rows of a table of losses that fit a screen.
_MOST_ROWS = 12


@dataclass(frozen=True)
class HealReport(Record):
    """How healing went.

    `print(report)` shows it in words and tables.

    Attributes:
        steps: optimiser steps.
        num_samples: samples seen, repeats counted.
        tokens: tokens seen, padding left out.
        trainable_parameters: parameters that were trained.
        total_parameters: all parameters of the student.
        losses: one dict per logged step: "step" and the loss terms by name.
        final: the last values by name.
        seconds: wall-clock time of training.
        objective: "chat", "contrastive", "caption" or "vqa".
        settings: the settings of the run (any JSON values).
        gates: tower -> original layer -> branch -> final factor, folded into the weights; empty
            without gates.
        unit_gates: tower -> original layer -> place in the layer, such as "self_attn" -> one factor
            per query head, or per 8 neurons; likewise. `Scores.with_gates` takes them.
        validation: what the validation samples said, the kept point first: "share" of the way from
            the student before healing (0) to the one after it (1), and there "ce", "kl" and their
            weighted sum "loss"; empty without a validation_fraction.
    """

    kind: ClassVar[str] = "heal"
    # 2: unit_gates; 3: validation
    schema: ClassVar[int] = 3

    steps: int
    num_samples: int
    tokens: int
    trainable_parameters: int
    total_parameters: int
    losses: tuple[dict[str, Any], ...] = ()
    final: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    objective: str = "chat"
    settings: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    unit_gates: dict[str, dict[int, dict[str, tuple[float, ...]]]] = field(default_factory=dict)
    validation: tuple[dict[str, float], ...] = ()

    @property
    def share(self) -> float:
        """How much of the way to the trained student was kept, 0..1; 1 without validation."""
        return self.validation[0]["share"] if self.validation else 1.0

    def __str__(self) -> str:
        """Say how much was trained on what, with tables of the losses and of the validation."""
        parts = [
            f"Healed for {self.steps} steps on {self.num_samples} samples ({number(self.tokens)} "
            f"tokens) in {self.seconds:.0f} s; trained {number(self.trainable_parameters)} of "
            f"{number(self.total_parameters)} parameters"
        ]
        if self.losses:
            last = len(self.losses) - 1
            shown = min(last + 1, _MOST_ROWS)
            places = [round(last * row / max(shown - 1, 1)) for row in range(shown)]
            parts.append(_table([self.losses[place] for place in places]))
        for kind, gates in (("branches", self.gates), ("heads and neurons", self.unit_gates)):
            for tower, layers in gates.items():
                parts.append(f"Gates of {kind} in {len(layers)} layers of {tower}")
        if self.validation:
            parts.append(f"The validation samples keep {self.share:.0%} of the way")
            parts.append(_table(self.validation))
        return "\n\n".join(parts)


def _table(entries: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    rows = [[f"{entry[name]:.4g}" if name in entry else "" for name in names] for entry in entries]
    return plain_table(names, rows)
