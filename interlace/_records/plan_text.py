"""A plan as text: a table of its layers, a strip per tower and a line on what it saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interlace._records.plan import Plan, TowerPlan

# One letter per layer keeps towers of 40 layers on one line and works in every font.
MARKS = {"drop": "x", "tune": "T", "freeze": "F", "keep": "."}

_LEGEND = "x drop   T tune   F freeze (anchor)   . keep"


def strip(tower: TowerPlan) -> str:
    """Return one mark per layer of the original tower."""
    return "".join(MARKS[tower.action(layer)] for layer in range(tower.num_layers))


def _table(tower: TowerPlan) -> list[str]:
    lines = [f"{'layer':>5}  {'score':>9}  {'action':<6}  reason"]
    for layer in range(tower.num_layers):
        score = tower.layer_scores[layer]
        shown = f"{score:>9.5f}" if score is not None else f"{'-':>9}"
        reason = tower.reasons.get(layer, "")
        lines.append(f"{layer:>5}  {shown}  {tower.action(layer):<6}  {reason}".rstrip())
    return lines


def _cuts(tower: TowerPlan) -> list[str]:
    """One line per place that loses units or goes: how many, and in how many layers."""
    lines = []
    for site, layers in tower.cut.items():
        counts = [len(units) for units in layers.values() if units]
        if not counts:
            continue
        span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}..{max(counts)}"
        lines.append(
            f"{site}: {span} units cut in each of {len(counts)} layers, {sum(counts)} in all"
        )
    for site, lost in tower.parts.items():
        listed = ", ".join(map(str, lost))
        lines.append(f"{site}: taken out of {len(lost)} layers whole ({listed})")
    return lines


def _count(value: float, step: float, units: tuple[str, ...]) -> str:
    unit = 0
    while abs(value) >= step and unit < len(units) - 1:
        value /= step
        unit += 1
    digits = 0 if unit == 0 else 2
    return f"{value:.{digits}f} {units[unit]}".rstrip()


def number(value: float) -> str:
    """Return a count such as "8.77 G"."""
    return _count(value, 1000.0, ("", "k", "M", "G", "T", "P"))


def size(num_bytes: float) -> str:
    """Return a size such as "16.34 GiB"."""
    return _count(num_bytes, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB"))


def _saved(plan: Plan) -> str:
    before = plan.shape
    if before is None:
        return ""
    after = before.after({n: tower for n, tower in plan.towers.items() if n in before.towers})
    width = before.bytes_per_parameter
    share = after.total_parameters / before.total_parameters if before.total_parameters else 1.0
    weights = [size(each.total_parameters * width) for each in (before, after)]
    caches = [
        sum(tower.kv_values_per_token for tower in each.towers.values()) * width
        for each in (before, after)
    ]
    text = (
        f"parameters {number(before.total_parameters)} -> {number(after.total_parameters)} "
        f"({share:.1%}), weights {weights[0]} -> {weights[1]}"
    )
    if caches[0]:
        text += f", KV cache {size(caches[0])} -> {size(caches[1])} per token"
    return text


def plan_text(plan: Plan) -> str:
    """Return the whole plan as monospace text."""
    title = f"Plan by rule '{plan.rule}'"
    if plan.model_name:
        title += f" for {plan.model_name}"
    blocks = [title]
    for name, tower in plan.towers.items():
        head = (
            f"{name}: {tower.num_layers} layers, drop {len(tower.drop)}, tune {len(tower.tune)}, "
            f"freeze {len(tower.freeze)}, {len(tower.kept)} left"
        )
        blocks.append("\n".join([head, *_cuts(tower), *_table(tower)]))
    width = max((len(name) for name in plan.towers), default=0)
    strips = [f"{name:<{width}}  |{strip(tower)}|" for name, tower in plan.towers.items()]
    blocks.append("\n".join([*strips, f"{'':<{width}}   {_LEGEND}"]))
    saved = _saved(plan)
    return "\n\n".join([*blocks, saved] if saved else blocks)
