"""The model card of an exported model: what was done and measured, read from the records alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.models.bridges import run_time
from interlace.records import EvalReport, HealReport, Plan, Scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from interlace.export.verify import Verification
    from interlace.models.handle import VLM
    from interlace.records import Bridge, PruneRecord, Record

_TASKS = {
    "chat": "image-text-to-text",
    "vqa": "visual-question-answering",
    "caption": "image-to-text",
    "contrastive": "zero-shot-image-classification",
}
_MARKS = "x dropped   T tuned when healing   F frozen anchor   . kept"
# "organisation/model", which names a model on the hub, unlike a path of some machine.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(
    vlm: VLM, records: Iterable[Record] = (), *, verification: Verification | None = None
) -> str:
    """Write the README.md of a checkpoint.

    Args:
        vlm: the exported model.
        records: what is known about it; every number of the card stands in one of them or in the
            manifest.
        verification: how the reloaded checkpoint compared, where that was done.

    Returns:
        Markdown with a YAML front matter.
    """
    known = list(records)
    base = _base(vlm, known)
    parts = [_front_matter(vlm, base), _title(vlm, _public(base))]
    if vlm.record is not None:
        parts.append(_layers(vlm, known))
    parts += [_healing(record) for record in known if isinstance(record, HealReport)]
    parts += [_results(record) for record in known if isinstance(record, EvalReport)]
    parts += [_loading(vlm), _origin(vlm, known, verification)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(vlm: VLM, records: Sequence[Record]) -> str:
    """The name of the model before the cut; a student that was opened again has its folder's."""
    if vlm.record is not None:
        for plan in _plans(vlm, records):
            if plan.model_name and _counts_original(vlm.record, plan):
                return plan.model_name
    return vlm.name


def _plans(vlm: VLM, records: Sequence[Record]) -> list[Plan]:
    given = [each for each in records if isinstance(each, Plan)]
    # a plan of a student that was pruned before stands beside the same in original numbers
    return [*given, *([vlm.plan] if vlm.plan is not None else [])]


def _counts_original(record: PruneRecord, plan: Plan) -> bool:
    return all(
        each.num_layers == len(record.towers[tower]) + len(record.dropped.get(tower, ()))
        for tower, each in plan.towers.items()
    )


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _public(name: str) -> str:
    """Shorten a path to its last part; no more of it says something to others."""
    return name if _is_hub_id(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _front_matter(vlm: VLM, base: str) -> str:
    lines = ["---", "library_name: transformers", f"pipeline_tag: {_TASKS[vlm.family.objective]}"]
    if _is_hub_id(base):
        lines.append(f"base_model: {json.dumps(base)}")
    lines += ["tags:", "- interlace"]
    if vlm.record is not None and vlm.record.dropped:
        lines.append("- layer-pruning")
    if vlm.record is not None and vlm.record.widths:
        lines.append("- width-pruning")
    return "\n".join([*lines, "---"])


def _title(vlm: VLM, name: str) -> str:
    record = vlm.record
    if record is not None and not record.dropped and (record.widths or record.config_changes):
        text = f"{name} with fewer heads or neurons in its layers, made with INTERLACE."
        return f"# {name}, narrowed\n\n{text}"
    if record is None or not record.dropped:
        return f"# {name}\n\nNo layer of this model was removed."
    counts = ", ".join(
        f"{len(gone)} of {len(gone) + len(record.towers[tower])} {tower.replace('_', ' ')} layers"
        for tower, gone in record.dropped.items()
    )
    return f"# {name}, pruned\n\n{name} without {counts}, made with INTERLACE."


def _standard(vlm: VLM) -> bool:
    return vlm.record is None or vlm.record.standard


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _layers(vlm: VLM, records: Sequence[Record]) -> str:
    record: Any = vlm.record
    plans = [each for each in records if isinstance(each, Plan)]
    numbered = _plans(vlm, records)
    rows = []
    strips = []
    width = max(map(len, record.towers))
    for tower, kept in record.towers.items():
        gone = record.dropped.get(tower, ())
        rows.append((tower, len(kept) + len(gone), len(kept), _listed(gone)))
        strips.append(f"{tower:<{width}}  |{_strip(tower, kept, gone, numbered)}|")
    before, after = record.parameters_before, record.parameters_after
    share = f" ({after / before:.1%})" if before else ""
    text = [
        "## Layers",
        _table(("tower", "layers before", "layers now", "dropped (original numbers)"), rows),
        "\n".join(["```text", *strips, "", _MARKS, "```"]),
        f"Parameters: {before:,} before, {after:,} now{share}.",
    ]
    for tower, layers in record.widths.items():
        text.append(_table((f"{tower} layer", "place", "heads or neurons"), _widths(layers)))
    if plans:
        rules = ", ".join(dict.fromkeys(f"`{plan.rule}`" for plan in plans))
        text.append(f"Chosen by the rule {rules}; `plan.json` holds the scores and reasons.")
        if not all(_counts_original(record, plan) for plan in plans):
            text.append(
                "It counts the layers of the student that was pruned, not the original ones."
            )
    if record.bridges:
        text += _bridges(record.bridges)
    text += [f"- {note}" for note in record.notes]
    return "\n\n".join(text)


def _widths(layers: Any) -> list[tuple[object, ...]]:
    """One row per layer and place: how many query heads each KV head has, or the neurons."""
    return [
        (layer, place, "+".join(map(str, groups)) or "none (taken out)")
        for layer, places in layers.items()
        for place, groups in places.items()
    ]


def _bridges(bridges: Sequence[Bridge]) -> list[str]:
    rows = [
        (
            each.tower,
            _listed(each.dropped),
            each.kind,
            "start" if each.after is None else each.after,
            "-" if each.error_before is None else _number(each.error_before),
            "-" if each.error_after is None else _number(each.error_after),
        )
        for each in bridges
    ]
    head = ("tower", "in place of layers", "bridge", "behind layer", "error without", "error with")
    return [
        "Bridges stand in for the removed layers; refitted layers correct what is left over. The "
        "errors are squared distances of the hidden "
        "states there from those of the original model, over their squared size, on held-out "
        "samples, before any healing.",
        _table(head, rows),
    ]


def _strip(tower: str, kept: Sequence[int], gone: Sequence[int], plans: Sequence[Plan]) -> str:
    """One mark per layer of the original tower."""
    marks = ["."] * (len(kept) + len(gone))
    for plan in plans:
        own = plan.towers.get(tower)
        # a plan in the numbers of a student does not line up with the original layers
        if own is None or own.num_layers != len(marks):
            continue
        for layers, mark in ((own.freeze, "F"), (own.tune, "T")):
            for layer in layers:
                marks[layer] = mark
    for layer in gone:
        marks[layer] = "x"
    return "".join(marks)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _healing(report: HealReport) -> str:
    rows: list[tuple[str, str]] = [
        ("steps", _number(report.steps)),
        ("samples", _number(report.num_samples)),
        ("tokens", _number(report.tokens)),
        (
            "trained parameters",
            f"{_number(report.trainable_parameters)} of {_number(report.total_parameters)}",
        ),
        ("time", f"{report.seconds:.0f} s"),
        *([("kept of the way", f"{report.share:.0%}")] if report.validation else []),
        *((f"final {name}", _number(value)) for name, value in report.final.items()),
    ]
    return "\n\n".join(("## Healing", _table(("", "value"), rows)))


def _results(report: EvalReport) -> str:
    compared = report.baseline is not None
    head = ["task", "samples", "metric", "value", *(["dense", "retention"] if compared else [])]
    rows = []
    for task, metrics in report.metrics.items():
        for metric, value in metrics.items():
            row = [task, _number(report.num_samples.get(task, "-")), metric, _number(float(value))]
            if report.baseline is not None:
                base = report.baseline.get(task, {}).get(metric)
                kept = (report.retention or {}).get(task, {}).get(metric)
                row += [
                    "-" if base is None else _number(float(base)),
                    "-" if kept is None else f"{kept:.1%}",
                ]
            rows.append(row)
    title = "## Results" + (f" of {_public(report.model_name)}" if report.model_name else "")
    return "\n\n".join((title, _table(head, rows)))


def _loading_with_package(record: PruneRecord) -> str:
    found = []
    alone = "transformers alone cannot load the folder."
    if record.widths:
        found.append("layers that differ in their heads or neurons")
    if run_time(record.bridges):
        found.append("run-time bridges")
        if not record.widths:
            alone = (
                "transformers alone loads the folder without them, warns of unused weights, and "
                "computes something else."
            )
    code = [
        "import interlace as il",
        "",
        'folder = "."  # this folder',
        "vlm = il.open_model(folder)  # vlm.model, vlm.processor",
    ]
    return "\n\n".join(
        (
            "## Loading",
            f"NOT a standard transformers checkpoint: it has {' and '.join(found)}, listed in "
            "`interlace.json`, which only INTERLACE (`pip install interlace-vlm`) builds. "
            f"{alone}",
            "\n".join(["```python", *code, "```"]),
        )
    )


def _loading(vlm: VLM) -> str:
    if vlm.record is not None and not vlm.record.standard:
        return _loading_with_package(vlm.record)
    architecture = type(vlm.model).__name__
    code = [
        f"from transformers import AutoProcessor, {architecture}",
        "",
        'folder = "."  # this folder, or the name of the repository it was uploaded to',
        f'model = {architecture}.from_pretrained(folder, dtype="auto")',
    ]
    if vlm.processor is None:
        code[0] = f"from transformers import {architecture}"
    else:
        code.append("processor = AutoProcessor.from_pretrained(folder)")
    return "\n\n".join(
        (
            "## Loading",
            "A standard transformers checkpoint: nothing but transformers is needed.",
            "\n".join(["```python", *code, "```"]),
            "With INTERLACE, `il.open_model(folder)` also knows the original number of every "
            "layer.",
        )
    )


def _origin(vlm: VLM, records: Sequence[Record], verification: Verification | None) -> str:
    lines = ["## How it was made"]
    if verification is not None:
        version = f"transformers {verification.transformers}"
        loader = f"by {version} alone" if _standard(vlm) else f"by INTERLACE on {version}"
        lines.append(
            f"Reloaded in a fresh process {loader}: largest difference of any output value "
            f"{verification.max_difference:.3g} (values up to {verification.max_value:.3g}; towers "
            f"that took part: {', '.join(verification.towers)})."
        )
    rows = []
    for record in records:
        made = record.provenance
        about = ""
        if isinstance(record, Scores):
            samples = {name: tower.num_samples for name, tower in record.towers.items()}
            about = ", ".join(f"{count:,} samples ({name})" for name, count in samples.items())
        rows.append(
            (
                record.kind,
                f"`{record.fingerprint[:12]}`",
                made.package_version,
                f"torch {made.torch or '-'}, transformers {made.transformers or '-'}",
                made.device,
                "-" if made.seed is None else made.seed,
                about,
            )
        )
    if rows:
        head = ("record", "fingerprint", "interlace", "libraries", "device", "seed", "")
        lines.append(_table(head, rows))
    return "\n\n".join(lines) if len(lines) > 1 else ""
