"""EvalReport: what a model measured on tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from interlace._records.base import Record
from interlace._records.tables import plain_table


@dataclass(frozen=True)
class EvalReport(Record):
    """What a model measured on tasks, beside a baseline where one was given.

    `print(report)` shows it as a table.

    Attributes:
        metrics: task -> metric -> value.
        baseline: the same of the baseline; None without one.
        retention: task -> metric -> value / baseline value, or baseline value / value where lower
            is better; None without a baseline.
        num_samples: task -> samples.
        details: anything else (any JSON values).
        model_name: name or path the model was opened by.
    """

    kind: ClassVar[str] = "eval"

    metrics: dict[str, dict[str, float]]
    baseline: dict[str, dict[str, float]] | None = None
    retention: dict[str, dict[str, float]] | None = None
    num_samples: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    model_name: str = ""

    def __str__(self) -> str:
        """Lay out the metrics, one a line, with baseline and retention where measured."""
        rows = []
        for task, metrics in self.metrics.items():
            for name, value in metrics.items():
                row = [task, name, f"{value:.4g}"]
                if self.baseline is not None:
                    before = self.baseline.get(task, {}).get(name)
                    kept = (self.retention or {}).get(task, {}).get(name)
                    row.append("" if before is None else f"{before:.4g}")
                    row.append("" if kept is None else f"{100 * kept:.1f} %")
                rows.append(row)
        header = ["task", "metric", "value"]
        if self.baseline is not None:
            header += ["baseline", "retention"]
        return plain_table(header, rows)
