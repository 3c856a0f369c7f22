"""A bar chart per op: what every contender took on every case."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

mpl.use("agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from interlace.microbenchmarks.measure import Record

_BACKEND_COLOURS = {"cuda": "#1b7837", "triton": "#5aae61", "cpp": "#1b7837", "torch": "#a6611a"}


def plot_cases(records: Sequence[Record], path: Path) -> None:
    """Draw the medians of an op's cases, with p20 and p80 as whiskers.

    Args:
        records: cases of one op.
        path: PNG file to write.
    """
    names = list(dict.fromkeys(row["name"] for record in records for row in record["rows"]))
    names.sort(key=lambda name: name not in _BACKEND_COLOURS)
    greys = iter(plt.get_cmap("Purples")(np.linspace(0.35, 0.9, max(1, len(names)))))
    colours = {name: _BACKEND_COLOURS.get(name) or next(greys) for name in names}
    height = 0.8 / max(1, len(names))
    figure, axes = plt.subplots(
        figsize=(9, 1.5 + 0.22 * sum(1 + len(record["rows"]) for record in records)),
        layout="constrained",
    )
    for number, name in enumerate(names):
        places, rows = [], []
        for place, record in enumerate(records):
            for row in record["rows"]:
                if row["name"] == name:
                    places.append(place - 0.4 + (number + 0.5) * height)
                    rows.append(row)
        median, low, high = (
            np.array([row[key] for row in rows]) for key in ("median_ms", "p20_ms", "p80_ms")
        )
        axes.barh(places, median, height, label=name, color=colours[name])
        axes.errorbar(median, places, xerr=(median - low, high - median), fmt="none", ecolor="0.3")
    axes.set_yticks(
        range(len(records)),
        [f"{each['case']}\n{each['direction']}, {each['dtype']}" for each in records],
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms (median, p20 to p80), less is better")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    axes.set_title(records[0]["op"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
