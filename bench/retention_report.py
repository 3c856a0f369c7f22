"""The tables of a file of retention cells."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]
# (fraction, label of the method, model)
Key = tuple[float, str, str]


def dense_of(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return model -> "task/metric" -> value of the dense model."""
    return {row["cell"][0]: row["raw"] for row in rows if row["cell"][1] == "dense"}


def by_method(rows: list[Row]) -> dict[Key, list[Row]]:
    """Return the cells of all seeds of every fraction, method (with its bridges) and model."""
    cells: dict[Key, list[Row]] = {}
    for row in rows:
        if row["cell"][1] not in ("dense", "speed"):
            name, method, fraction, _, *bridges = row["cell"]
            label = " + ".join([f"`{method}`", *bridges])
            cells.setdefault((fraction, label, name), []).append(row)
    return cells


def _retention(rows: list[Row], metric: str, dense: float) -> str:
    """Percent of the dense model: mean before -> mean after healing, half the range over seeds."""
    done = [row for row in rows if "raw" in row]
    if not rows:
        return ""
    if not done:
        return "refused"
    before = [100 * row["raw"][metric] / dense for row in done]
    after = [100 * row["healed"][metric] / dense for row in done if "healed" in row]
    if not after:
        return f"{statistics.fmean(before):.1f}"
    kept = f"{statistics.fmean(before):.1f} → {statistics.fmean(after):.1f}"
    # one seed has no spread
    return kept if len(after) == 1 else f"{kept} ± {(max(after) - min(after)) / 2:.1f}"


def table(rows: list[Row]) -> str:
    """Markdown, one table per fraction: a line per method, a column per metric of each model."""
    dense = dense_of(rows)
    columns = [(name, metric) for name, metrics in dense.items() for metric in metrics]
    cells = by_method(rows)
    lines = []
    for fraction in sorted({fraction for fraction, _, _ in cells}):
        head = " | ".join(f"{name} {metric.split('/')[1]}" for name, metric in columns)
        full = " | ".join(f"{dense[name][metric]:.3f}" for name, metric in columns)
        lines += [
            f"| {fraction:.0%} of the layers | {head} |",
            "| --- " * (len(columns) + 1) + "|",
            f"| dense | {full} |",
        ]
        for label in dict.fromkeys(label for at, label, _ in cells if at == fraction):
            found = " | ".join(
                _retention(cells.get((fraction, label, name), []), metric, dense[name][metric])
                for name, metric in columns
            )
            lines.append(f"| {label} | {found} |")
    return "\n".join(lines)
