"""Tables of measurements as plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.records import EvalReport

__all__ = ["eval_table", "plain_table"]


def plain_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out rows under a header, columns aligned by two spaces.

    Args:
        header: one title per column.
        rows: cells; numbers are set flush right.

    Returns:
        The table, without a trailing newline.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [
        max(len(title), *(len(row[column]) for row in cells)) if cells else len(title)
        for column, title in enumerate(header)
    ]
    right = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        for column in range(len(header))
    ]

    def line(parts: Sequence[str]) -> str:
        set_out = [
            part.rjust(width) if flush else part.ljust(width)
            for part, width, flush in zip(parts, widths, right, strict=True)
        ]
        return "  ".join(set_out).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def eval_table(report: EvalReport) -> str:
    """Lay out a report: one line per metric, with baseline and retention where measured."""
    rows = []
    for task, metrics in report.metrics.items():
        for name, value in metrics.items():
            row = [task, name, f"{value:.4g}"]
            if report.baseline is not None:
                before = report.baseline.get(task, {}).get(name)
                kept = (report.retention or {}).get(task, {}).get(name)
                row.append("" if before is None else f"{before:.4g}")
                row.append("" if kept is None else f"{100 * kept:.1f} %")
            rows.append(row)
    header = ["task", "metric", "value"]
    if report.baseline is not None:
        header += ["baseline", "retention"]
    return plain_table(header, rows)
