"""HealReport: how healing went."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from interlace._records.base import Record


@dataclass(frozen=True)
class HealReport(Record):
    """How healing went.

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
