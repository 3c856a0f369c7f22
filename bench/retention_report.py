"""The tables of a file of retention cells."""

from __future__ import annotations

import math
import statistics
from typing import Any

Row = dict[str, Any]
# what columns are called, in their order
_TITLES = {
    ("clip", "retrieval/image_to_text_r1"): "CLIP R@1, image to text",
    ("clip", "retrieval/text_to_image_r1"): "CLIP R@1, text to image",
    ("blip", "caption/cider"): "BLIP CIDEr",
    ("blip", "caption/exact_match"): "BLIP exact caption",
    ("qwen3-vl", "vqa/accuracy"): "Qwen3-VL questions",
    ("qwen3-vl", "caption/cider"): "Qwen3-VL CIDEr",
    ("clip", "fidelity/image_to_text_kl"): "CLIP, image to text",
    ("clip", "fidelity/text_to_image_kl"): "CLIP, text to image",
    ("blip", "fidelity/kl"): "BLIP",
    ("qwen3-vl", "fidelity/kl"): "Qwen3-VL",
}
_HARDER = {"clip": "clip-2048", "blip": "blip-crowded", "qwen3-vl": "qwen3-vl-crowded"}
_MODELS = {"clip-2048": "CLIP", "blip-crowded": "BLIP", "qwen3-vl-crowded": "Qwen3-VL"}
COLUMNS = {
    (name, metric): title
    for (bundled, metric), title in _TITLES.items()
    for name in (bundled, _HARDER[bundled])
}
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
    """Percent of the dense model: mean before -> mean after healing, half the range over seeds.

    Distances, which are 0 for the dense model, are shown in thousandths instead.
    """
    if not rows:
        return "-"
    unit = dense / 100 or 1e-3
    # a student that is healed while it is made has no figures before
    before, after = (
        [row[stage][metric] / unit for row in rows if stage in row] for stage in ("raw", "healed")
    )
    if not before and not after:
        return "refused"
    shown = _percent if dense else _three_digits
    kept = " → ".join(shown(statistics.fmean(each)) for each in (before, after) if each)
    # one seed has no spread
    return kept if len(after) < 2 else f"{kept} ± {shown((max(after) - min(after)) / 2)}"


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _three_digits(value: float) -> str:
    """Write what may differ by powers of ten, without their exponents."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def _difference(rows: list[Row], usual: list[Row], metric: str, dense: float) -> str:
    """Points of the dense model by which rows differ from others of the same seeds."""
    if not rows:
        return ""
    others = {row["cell"][3]: row for row in usual}
    shown = []
    for stage in ("raw", "healed"):
        found = [
            100 * (row[stage][metric] - others[row["cell"][3]][stage][metric]) / dense
            for row in rows
            if stage in row and stage in others.get(row["cell"][3], {})
        ]
        if found:
            spread = f" ± {(max(found) - min(found)) / 2:.1f}" if len(found) > 1 else ""
            shown.append(f"{statistics.fmean(found):+.1f}{spread}")
    if not shown:
        return "refused" if all("no_plan" in row for row in rows) else ""
    return " → ".join(shown)


def _gone(rows: list[Row], dense: Row) -> str:
    """Percent of all parameters of a model that are gone, or zero, in the mean of the seeds."""
    left = [row.get("nonzero_parameters", row["parameters"]) for row in rows if "parameters" in row]
    return f"{100 * (1 - statistics.fmean(left) / dense['parameters']):.1f}" if left else "-"


def table(rows: list[Row], against: str = "", *, sizes: bool = False) -> str:
    """Markdown, one table per fraction: a line per method, a column per metric of each model.

    Args:
        rows: cells of a results file.
        against: method from which the others are shown as differences, in points; default: all are
            shown as percent of the dense model.
        sizes: say how many parameters are gone, and speak of a share of them.
    """
    dense = dense_of(rows)
    there = [(name, metric) for name, metrics in dense.items() for metric in metrics]
    columns = [each for each in COLUMNS if each in there]
    columns += [each for each in there if each not in COLUMNS]
    cells = by_method(rows)
    whole = {row["cell"][0]: row for row in rows if row["cell"][1] == "dense"}
    lines = []
    for fraction in sorted({fraction for fraction, _, _ in cells}):
        head = " | ".join(COLUMNS.get(each, " ".join(each)) for each in columns)
        full = " | ".join(f"{dense[name][metric]:.3f}" for name, metric in columns)
        lines += [
            *([""] if lines else []),
            f"| {fraction:.0%} of the {'parameters' if sizes else 'layers'} | {head} |",
            "| --- " * (len(columns) + 1) + "|",
            f"| dense | {full} |",
        ]
        for label in dict.fromkeys(label for at, label, _ in cells if at == fraction):
            own = {name: cells.get((fraction, label, name), []) for name in dense}
            usual = {name: cells.get((fraction, f"`{against}`", name), []) for name in dense}
            found = " | ".join(
                _difference(own[name], usual[name], metric, dense[name][metric])
                if against and label != f"`{against}`"
                else _retention(own[name], metric, dense[name][metric])
                for name, metric in columns
            )
            gone = " / ".join(_gone(own[name], whole[name]) for name in dense)
            lines.append(f"| {label}{f' ({gone} % gone)' if sizes else ''} | {found} |")
    return "\n".join(lines)


def summary(rows: list[Row], fractions: list[float] | None = None) -> str:
    """Markdown, one table: a line per method, the best first, a column per model and fraction.

    Every cell is the mean over the metrics of the model, in percent of the dense model; of
    distances from it in thousandths.

    Args:
        rows: cells of a results file.
        fractions: of the layers, those of the columns; default: all.
    """
    dense = dense_of(rows)
    cells = by_method(rows)
    shares = sorted(fractions or {fraction for fraction, _, _ in cells})
    columns = [(name, share) for name in dense for share in shares]
    lines = [
        "| |" + "".join(f" {_MODELS.get(name, name)}, {share:.0%} |" for name, share in columns),
        "| --- " * (len(columns) + 1) + "|",
    ]
    kept = {
        label: [_means(cells.get((share, label, name), []), dense[name]) for name, share in columns]
        for label in dict.fromkeys(label for at, label, _ in cells if at in shares)
    }
    whole = 100.0 if any(value for metrics in dense.values() for value in metrics.values()) else 0.0
    for label in sorted(kept, key=lambda each: _rank(kept[each], whole), reverse=True):
        found = (_retention(rows, "mean", whole) for rows in kept[label])
        lines.append(f"| {label} | {' | '.join(found)} |")
    return "\n".join(lines)


def _rank(columns: list[list[Row]], whole: float) -> tuple[int, float]:
    """What methods are sorted by: those with more columns first, then the nearest to `whole`."""
    healed = [row["healed"]["mean"] for rows in columns for row in rows if "healed" in row]
    there = sum(any("healed" in row for row in rows) for rows in columns)
    kept = statistics.fmean(healed) if healed else 0.0
    return there, kept if whole else -kept


def _means(rows: list[Row], dense: dict[str, float]) -> list[Row]:
    """Return rows that hold the mean over the metrics alone, in percent of the dense model.

    Distances from it, where its own are 0, stay as they are.
    """

    def mean(found: dict[str, float]) -> dict[str, float]:
        return {
            "mean": statistics.fmean(
                100 * found[name] / value if value else found[name] for name, value in dense.items()
            )
        }

    return [
        {stage: mean(row[stage]) for stage in ("raw", "healed") if stage in row} for row in rows
    ]
