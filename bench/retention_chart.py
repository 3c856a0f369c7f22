"""What is kept against how much faster it is: one panel per model, one line per method."""

from __future__ import annotations

import io
import statistics
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from methods import METHODS
from PIL import Image
from retention_report import by_method, dense_of

from interlace.errors import DataError

mpl.use("agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from retention_report import Row

# The colours of Okabe and Ito, which people with any kind of colour vision can tell apart; every
# line has a marker of its own as well.
_OURS = "#D55E00"
_OTHERS = "#BBBBBB"
_LINES = {
    "compensated": ("compensated, ours", "#D55E00", "o"),
    "compensated_parts": ("compensated_parts, ours", "#882255", "p"),
    "compensated_split": ("compensated_split, ours", "#CC3311", "H"),
    "compensated_split_norm": ("compensated_split_norm, ours", "#AA4499", "d"),
    "interlace": ("INTERLACE, as published", "#0072B2", "s"),
    "shortgpt": ("ShortGPT", "#56B4E9", "^"),
    "uidl": ("UIDL", "#CC79A7", "v"),
    "sleb": ("SLEB", "#009E73", "D"),
    "replaceme": ("ReplaceMe", "#E69F00", "<"),
    "linearpatch": ("LinearPatch", "#8C6D1F", ">"),
    "kd": ("distillation", "#000000", "X"),
    "width": ("width", "#666666", "P"),
    "flap": ("FLAP", "#DDCC77", "8"),
    "wanda": ("Wanda", "#999933", "1"),
    "sparsegpt": ("SparseGPT", "#117733", "2"),
    "magnitude": ("magnitude", "#44AA99", "*"),
    "magnitude_2_4": ("2:4 magnitude", "#332288", "h"),
}
# Where nothing usable is left, the lines of the better methods would be pressed together.
FLOOR = 50.0
# inches: a panel, and an entry of the legend
_WIDTH, _HEIGHT = 4.2, 3.9
_ENTRY, _LINE = 1.9, 0.22
# Metrics where less is faster; of all others more is.
_SECONDS = "seconds"
_NOT_SPEED = ("num_parameters", "peak_memory_bytes")


def speed_up(speed: dict[str, dict[str, float]]) -> float:
    """Return the geometric mean of how many times faster the student is, over what was timed.

    Args:
        speed: "pruned" and "dense" -> metrics; prefill and decoding, or images and texts.
    """
    ratios = []
    for name, dense in speed["dense"].items():
        if name not in _NOT_SPEED:
            ratio = speed["pruned"][name] / dense
            ratios.append(1 / ratio if name.endswith(_SECONDS) else ratio)
    return statistics.geometric_mean(ratios)


def points(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return (model, label of the method) -> (speed-up, percent kept) for every fraction.

    What is kept is the mean over all metrics of the model and all seeds, after healing where it was
    healed. Methods that were not timed, or refused, have no points.
    """
    speeds = {
        tuple(row["cell"][:1] + row["cell"][2:]): speed_up(row["speed"])
        for row in rows
        if row["cell"][1] == "speed" and "speed" in row
    }
    dense = dense_of(rows)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (fraction, label, name), cells in sorted(by_method(rows).items()):
        group = METHODS[cells[0]["cell"][1]].timed if cells[0]["cell"][1] in METHODS else "layers"
        speed = speeds.get((name, fraction) if group == "layers" else (name, fraction, group))
        if speed is None:
            continue
        kept = [
            100 * row.get("healed", row["raw"])[metric] / value
            for row in cells
            if "raw" in row
            for metric, value in dense[name].items()
        ]
        if kept:
            found.setdefault((name, label), []).append((speed, statistics.fmean(kept)))
    return found


def plot(rows: list[Row], path: Path, ours: Sequence[str] = ("interlace",)) -> None:
    """Draw the chart.

    Args:
        rows: cells of a results file, speed among them.
        path: PNG file to write.
        ours: the methods to highlight.

    Raises:
        DataError: the file holds nothing that was timed.
    """
    found = points(rows)
    models = [name for name in dense_of(rows) if any(name == model for model, _ in found)]
    if not models:
        raise DataError(
            "The results hold no method that was both measured and timed. Run the benchmark with "
            "--speed yes, or add speed with --speed only."
        )
    width = _WIDTH * len(models)
    figure, panels = plt.subplots(1, len(models), sharey=True, squeeze=False)
    entries: dict[str, Any] = {}
    for axes, model in zip(panels[0], models, strict=True):
        _panel(axes, model, found, ours, entries)
    panels[0][0].set_ylabel("ability kept after healing, % of dense")
    order = [label for label in entries if label != "other methods"]
    order += ["other methods"] * ("other methods" in entries)
    columns = min(len(order), int(width / _ENTRY))
    legend = _LINE * -(-len(order) // columns) + 0.15
    height = _HEIGHT + legend
    figure.set_size_inches(width, height)
    figure.legend(
        [entries[label] for label in order],
        order,
        loc="lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
    )
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    _save(figure, path)


def _panel(axes: Any, model: str, found: Any, ours: Sequence[str], entries: dict[str, Any]) -> None:
    hidden = 0
    for (name, label), places in found.items():
        if name != model:
            continue
        method, _, bridges = label.replace("`", "").partition(" + ")
        x, y = zip(*places, strict=True)
        hidden += sum(value < FLOOR for value in y)
        shown, colour, marker = _LINES.get(method, ("other methods", _OTHERS, "."))
        style: dict[str, Any] = {"color": colour, "marker": marker, "lw": 1.0, "ms": 5, "zorder": 2}
        if method in ours and not bridges:
            if method not in _LINES:
                shown, style["color"] = method, _OURS
            style |= {"lw": 2.6, "ms": 8, "zorder": 4}
        elif colour == _OTHERS:
            style |= {"zorder": 1}
        elif bridges:
            shown = f"{shown} + {bridges}"
            style |= {"ls": "--", "mfc": "white"}
        (entries[shown],) = axes.plot(x, y, **style)
    (entries["dense"],) = axes.plot(
        1, 100, marker="+", ms=13, mew=2.2, color="black", ls="none", zorder=5
    )
    axes.axhline(100, color="0.85", lw=0.8, zorder=0)
    # room for a marker above what is whole
    axes.set_ylim(FLOOR, max(102.0, 1.0 + max(axes.dataLim.y1, FLOOR)))
    axes.set_title(f"{model} (below {FLOOR:.0f} %: {hidden})" if hidden else model, fontsize=11)
    axes.set_xlabel("measured speed-up")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    """Write a PNG with a palette, which is a third of the size."""
    memory = io.BytesIO()
    figure.savefig(memory, dpi=110)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(memory).convert("RGB")
    # the palette covers the space of colours, so that a few pixels of a line keep theirs
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
