"""Figures made from records: the plan as a strip, similarities as a map, retention as a chart.

Every function returns a matplotlib Figure and touches no global state: no pyplot, no window, no
style of the caller. Colours are those of Okabe and Ito, told apart with any colour vision; what is
dropped is hatched as well.
"""

from __future__ import annotations

import io
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from interlace._files import atomic_write_bytes
from interlace.errors import ConfigError, PlanError, unknown_name

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from interlace.records import Action, Plan, Scores, TowerScores

ACTION_COLOURS: dict[Action, str] = {
    "drop": "#D55E00",
    "tune": "#0072B2",
    "freeze": "#56B4E9",
    "keep": "#E4E4E4",
}
_ACTION_WORDS: dict[Action, str] = {
    "drop": "drop",
    "tune": "tune",
    "freeze": "freeze (anchor)",
    "keep": "keep",
}
_CUT_COLOUR = "#CC79A7"
_SERIES_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
# Dates and program versions would make equal figures differ.
_DATELESS: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}

# Whole similarity maps are annotated with numbers only while these stay readable.
_ANNOTATED_CELLS = 200


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _cut_rows(plan: Plan, name: str) -> dict[str, dict[int, float]]:
    """Return label -> kept layer that has the place -> share of its units that goes, 0..1.

    Only of places that lose something. Where the plan does not know a width, the label has no share
    and the loss of a layer is drawn as a half.
    """
    tower = plan.towers[name]
    shape = None if plan.shape is None else plan.shape.towers.get(name)
    rows: dict[str, dict[int, float]] = {}
    for place in dict.fromkeys([*tower.cut, *tower.parts]):
        site = None if shape is None else shape.sites.get(place)
        units = {layer: len(gone) for layer, gone in tower.cut.get(place, {}).items()}
        shares: dict[int, float] = {}
        for layer in tower.kept:
            width = 2 * units.get(layer, 1) if site is None else site.num_units(layer)
            if layer in tower.parts.get(place, ()):
                shares[layer] = 1.0
            elif width:
                shares[layer] = units.get(layer, 0) / width
        known = site is not None or not units
        how_much = f"{statistics.fmean(shares.values()):.0%} cut" if known else "cut"
        rows[f"{place}: {how_much}"] = shares
    return rows


def _draw_layer(axes: Axes, layer: int, row: int, action: Action) -> None:
    axes.add_patch(
        Rectangle(
            (layer - 0.46, row - 0.38),
            0.92,
            0.76,
            facecolor=ACTION_COLOURS[action],
            edgecolor="white" if action == "drop" else "#555555",
            linewidth=0.6,
            hatch="////" if action == "drop" else None,
        )
    )


def _draw_cut(axes: Axes, layer: int, row: int, share: float) -> None:
    # the y-axis points down, so the share that goes hangs from the top
    for height, colour in ((1.0, ACTION_COLOURS["keep"]), (share, _CUT_COLOUR)):
        if height:
            axes.add_patch(
                Rectangle(
                    (layer - 0.46, row - 0.38),
                    0.92,
                    0.76 * height,
                    facecolor=colour,
                    edgecolor="#555555",
                    linewidth=0.6,
                )
            )


def plan_strip(plan: Plan) -> Figure:
    """Draw every planned tower as a row of layers: drop, tune, freeze, keep.

    Below it stands a row for every place, such as attention, that layers lose heads or neurons of,
    or lose whole: each layer filled by the share that goes. "+2" in a layer: it takes over 2 KV
    groups of dropped ones.

    Args:
        plan: the plan.

    Returns:
        The figure, with a legend.

    Raises:
        PlanError: the plan has no tower.
    """
    if not plan.towers:
        raise PlanError("The plan has no tower, so there is no strip to draw.")
    longest = max(tower.num_layers for tower in plan.towers.values())
    cuts = {name: _cut_rows(plan, name) for name in plan.towers}
    rows = len(plan.towers) + sum(map(len, cuts.values()))
    width = max(6.0 if any(cuts.values()) else 5.0, 0.28 * longest + 1.2)
    figure = _figure(width, 0.62 * rows + 1.1)
    axes = figure.add_subplot()
    labels: list[str] = []
    for name, tower in plan.towers.items():
        for layer in range(tower.num_layers):
            _draw_layer(axes, layer, len(labels), tower.action(layer))
        for layer, sources in tower.graft.items():
            taken = sum(map(len, sources.values()))
            axes.text(layer, len(labels), f"+{taken}", ha="center", va="center", fontsize=6.5)
        labels.append(f"{name}: {len(tower.kept)} of {tower.num_layers}")
        for label, shares in cuts[name].items():
            for layer, share in shares.items():
                _draw_cut(axes, layer, len(labels), share)
            labels.append(label)
    axes.set_xlim(-0.7, longest - 0.3)
    axes.set_ylim(rows - 0.5, -0.5)
    step = 1 if longest <= 24 else 4
    axes.set_xticks(range(0, longest, step))
    axes.set_xlabel("layer of the original model")
    axes.set_yticks(range(rows), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"Plan by rule '{plan.rule}'")
    keys = [
        Patch(
            facecolor=colour,
            edgecolor="white" if action == "drop" else "#555555",
            hatch="////" if action == "drop" else None,
            label=_ACTION_WORDS[action],
        )
        for action, colour in ACTION_COLOURS.items()
    ]
    if any(cuts.values()):
        keys.append(Patch(facecolor=_CUT_COLOUR, edgecolor="#555555", label="cut"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    return figure


def _whole_matrix(tower: TowerScores, group: str) -> list[list[float]]:
    # rows and columns are h_0 .. h_{L-1}, and h_L where the tails were recorded too
    layers = tower.num_layers
    packs, tail = tower.similarity[group], tower.tail.get(group, {})
    states = layers + 1 if all(pack in tail for pack in range(1, layers + 1)) else layers
    matrix = [[1.0 if i == j else math.nan for j in range(states)] for i in range(states)]
    for pack, values in packs.items():
        for start, value in enumerate(values):
            matrix[start][start + pack] = matrix[start + pack][start] = value
    if states == layers + 1:
        for pack in range(1, layers + 1):
            matrix[layers - pack][layers] = matrix[layers][layers - pack] = tail[pack]
    return matrix


def _pack_rows(tower: TowerScores, group: str) -> tuple[list[int], list[list[float]]]:
    packs, tail = tower.similarity[group], tower.tail.get(group, {})
    shown = sorted(packs)
    rows: list[list[float]] = []
    for pack in shown:
        row = [*packs[pack], tail.get(pack, math.nan)]
        rows.append(row + [math.nan] * (tower.num_layers - len(row)))
    return shown, rows


def _annotate(axes: Axes, rows: list[list[float]], low: float) -> None:
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if not math.isnan(value):
                dark = value < (1 + low) / 2
                text = f"{value:.2f}".removeprefix("0")
                colour = "white" if dark else "black"
                axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color=colour)


def similarity_map(scores: Scores, tower: str | None = None, group: str = "all") -> Figure:
    """Draw the cosine similarities of a tower's hidden states as a heat map.

    Where every pack was scored this is the whole symmetric matrix of hidden states; otherwise one
    row per pack p, whose column i is the similarity of h_i and h_{i+p}.

    Args:
        scores: what was measured.
        tower: name of the tower; default: "text" where there is one, else the first.
        group: token group.

    Returns:
        The figure.

    Raises:
        PlanError: there is no such tower, or the group has no similarities, as none were scored.
    """
    name = tower or ("text" if "text" in scores.towers else next(iter(scores.towers), ""))
    measured = scores[name]
    if not measured.similarity:
        raise PlanError(measured.no_similarity())
    if not measured.similarity.get(group):
        raise PlanError(unknown_name("token group", group, measured.similarity))
    layers = measured.num_layers
    if all(pack in measured.similarity[group] for pack in range(1, layers)):
        rows = _whole_matrix(measured, group)
        side = min(9.0, 2.2 + 0.2 * len(rows))
        figure = _figure(side + 1.0, side)
        axes = figure.add_subplot()
        axes.set_xlabel("hidden state (input of layer)")
        axes.set_ylabel("hidden state (input of layer)")
        aspect: Literal["equal", "auto"] = "equal"
    else:
        shown, rows = _pack_rows(measured, group)
        figure = _figure(max(5.0, 0.36 * layers + 1.6), 0.5 * len(rows) + 1.5)
        axes = figure.add_subplot()
        axes.set_yticks(range(len(rows)), [f"over {p} layer{'s' * (p > 1)}" for p in shown])
        axes.set_xlabel("first layer")
        aspect = "auto"
    known = [value for row in rows for value in row if not math.isnan(value)]
    low = min(known, default=0.0)
    image = axes.imshow(rows, cmap="cividis", vmin=low, vmax=1.0, aspect=aspect)
    if aspect == "auto" and len(known) <= _ANNOTATED_CELLS:
        _annotate(axes, rows, low)
    axes.set_title(f"Cosine similarity of hidden states: {name}, {group} tokens")
    figure.colorbar(image, ax=axes, shrink=0.9)
    return figure


def retention_chart(values: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw how much of the dense model's results is retained, as bars.

    Args:
        values: series (such as "before healing") -> label on the x-axis (such as a rule) ->
            retention, 1.0 = all. A label that a series lacks is left out.

    Returns:
        The figure, with a dashed line at 1.0.

    Raises:
        ConfigError: nothing to draw.
    """
    labels = list(dict.fromkeys(label for series in values.values() for label in series))
    if not labels:
        raise ConfigError("There is nothing to draw: give at least one series with one value.")
    figure = _figure(max(5.0, 0.28 * len(labels) * (len(values) + 1) + 1.5), 3.8)
    axes = figure.add_subplot()
    width = 0.8 / len(values)
    for index, (name, series) in enumerate(values.items()):
        shift = (index - (len(values) - 1) / 2) * width
        places = [labels.index(label) + shift for label in series]
        colour = _SERIES_COLOURS[index % len(_SERIES_COLOURS)]
        axes.bar(places, list(series.values()), width * 0.92, label=name, color=colour)
    axes.axhline(1.0, color="#555555", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(labels)), labels, rotation=20 if len(labels) > 4 else 0)
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("share of the dense model's result")
    axes.set_title("Retention")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(values)), frameon=False)
    return figure


def figure_format(path: str | os.PathLike[str]) -> str:
    """Return the format that a file's ending asks for: "png", "svg" or "pdf".

    Raises:
        ConfigError: the ending is none of these.
    """
    name = Path(path).suffix.lower().lstrip(".")
    if name not in _DATELESS:
        raise ConfigError(unknown_name("figure format", name, _DATELESS))
    return name


def figure_bytes(figure: Figure, file_format: str = "png", dpi: int = 150) -> bytes:
    """Return a figure as a file's content; the same figure gives the same bytes.

    Args:
        figure: the figure.
        file_format: "png", "svg" or "pdf".
        dpi: dots per inch of a PNG.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=dpi, metadata=_DATELESS[file_format])
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a .png, .svg or .pdf file, whole or not at all.

    Raises:
        ConfigError: the file's ending is none of these.
        CheckpointError: the file cannot be written.
    """
    return atomic_write_bytes(path, figure_bytes(figure, figure_format(path)))
