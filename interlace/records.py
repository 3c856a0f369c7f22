"""The records that the stages hand on: Scores, Plan, PruneRecord, HealReport, EvalReport.

A progressive run adds a ProgressiveRecord, which tells of all its stages.

Every record is frozen, equals its own copy read back from JSON, names the fingerprints of what it
was made from, and is refused on loading when its content no longer matches its fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from interlace._records.base import (
    Provenance,
    Record,
    parse_object,
    read_record_text,
)
from interlace._records.healing import HealReport
from interlace._records.plan import Action, Bridge, Plan, PruneRecord, TowerPlan
from interlace._records.progressive import ProgressiveRecord, StageRecord
from interlace._records.scores import Scores, TowerScores
from interlace._records.shape import ModelShape, SiteShape, TowerShape
from interlace._records.tables import plain_table
from interlace.errors import CheckpointError, unknown_name

if TYPE_CHECKING:
    import os

__all__ = [
    "Action",
    "Bridge",
    "EvalReport",
    "HealReport",
    "ModelShape",
    "Plan",
    "ProgressiveRecord",
    "Provenance",
    "PruneRecord",
    "Record",
    "Scores",
    "SiteShape",
    "StageRecord",
    "TowerPlan",
    "TowerScores",
    "TowerShape",
    "load_record",
]


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


_KINDS: dict[str, type[Record]] = {
    kind.kind: kind
    for kind in (Scores, Plan, PruneRecord, HealReport, EvalReport, ProgressiveRecord)
}


def load_record(path: str | os.PathLike[str]) -> Record:
    """Read a record of whatever kind the file says it is, and verify it.

    Raises:
        CheckpointError: the file is missing, damaged, altered or no record of a known kind.
    """
    text = read_record_text(path)
    kind = parse_object(text, str(path)).get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(f"{path}: {unknown_name('kind of record', kind, _KINDS)}")
    return _KINDS[kind].from_json(text, source=str(path))
