"""Where student and teacher are compared, and which parameters train: both follow from the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from interlace.errors import ConfigError
from interlace.models.bridges import RunTimeBridge, run_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.models import VLM, Tower
    from interlace.records import Plan, TowerPlan


@dataclass(frozen=True)
class Anchor:
    """A pair of layers whose outputs should agree.

    Attributes:
        tower: tower name.
        layer: number of the student's layer in the original model.
        position: place of the student's layer in its tower.
        teacher_position: place of the teacher's layer in its tower.
        last: the pair ends the tower, so it stands for the tower's last hidden state.
    """

    tower: str
    layer: int
    position: int
    teacher_position: int
    last: bool = False


def plan_of(student: VLM) -> Plan:
    """Return the plan that a student carries.

    Raises:
        ConfigError: it carries none, or the plan tunes nothing.
    """
    plan: Plan | None = getattr(student, "plan", None)
    if plan is None:
        raise ConfigError(
            "The student carries no plan, so it is not known which layers to tune. Heal what "
            "prune(vlm, plan) returned, or set student.plan to the plan it was pruned by."
        )
    bridged = student.record is not None and run_time(student.record.bridges)
    if not bridged and not any(tower.tune for tower in plan.towers.values()):
        raise ConfigError(
            f"The plan (rule '{plan.rule}') has no layers to tune in any tower, so there is "
            "nothing to heal. Use a rule that tunes layers, such as 'interlace', or skip healing."
        )
    return plan


def _tower(student: VLM, name: str) -> Tower:
    if name not in student.towers:
        raise ConfigError(
            f"The plan names the tower '{name}', but the student has {sorted(student.towers)}. "
            "Heal the student that was pruned by this plan."
        )
    return student.towers[name]


def tuned_parameters(student: VLM, plan: Plan) -> tuple[str, ...]:
    """Return the names of the parameters that train.

    These are the parameters of the plan's `tune` layers and of the student's run-time bridges, no
    other.

    Raises:
        ConfigError: the student lacks a tower or a layer of the plan, has a layer that it drops, or
            shares a parameter between a layer that trains and something that must not.
    """
    prefixes: list[str] = []
    for name, each in plan.towers.items():
        tower = _tower(student, name)
        present = set(tower.original)
        lost = sorted(set(each.tune) - present)
        undropped = sorted(set(each.drop) & present)
        if lost or undropped:
            raise ConfigError(
                f"Plan and student do not match in the tower '{name}': layers to tune that the "
                f"student lacks: {lost}; layers to drop that it still has: {undropped}. "
                "Heal the student that was pruned by this plan."
            )
        prefixes += [f"{tower.path}.{tower.original.index(layer)}." for layer in each.tune]
    prefixes += [
        f"{name}."
        for name, module in student.model.named_modules()
        if isinstance(module, RunTimeBridge)
    ]
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    for name, parameter in student.model.named_parameters(remove_duplicate=False):
        side = inside if name.startswith(tuple(prefixes)) else outside
        side.setdefault(id(parameter), name)
    for key in inside.keys() & outside.keys():
        raise ConfigError(
            f"{inside[key]} would train, but it is the same parameter as {outside[key]}, which "
            "must stay frozen. Choose a plan that does not tune this layer."
        )
    return tuple(inside.values())


def anchor_layers(plan: TowerPlan, kept: Sequence[int]) -> tuple[int, ...]:
    """Return the original layers to compare: the frozen anchors, else the layer after each drop.

    Args:
        plan: of the last cut.
        kept: original layers of the student, ascending; earlier cuts may have taken others.
    """
    if plan.freeze:
        return tuple(sorted(plan.freeze))
    after = {next((layer for layer in kept if layer > drop), None) for drop in plan.drop}
    return tuple(sorted(layer for layer in after if layer is not None))


def _teacher_position(teacher: VLM, name: str, layer: int) -> int:
    original = _tower(teacher, name).original
    if layer not in original:
        raise ConfigError(
            f"The teacher has no layer {layer} in its tower '{name}' to compare with; it has "
            f"{list(original)}. Give the model that the student was pruned from as the teacher."
        )
    return original.index(layer)


def find_anchors(student: VLM, teacher: VLM, plan: Plan) -> tuple[Anchor, ...]:
    """Pair the layers of student and teacher that distillation compares.

    Every pruned tower gives its anchors and, as the last of them, the end of the tower.

    Raises:
        ConfigError: the teacher lacks a tower or a layer.
    """
    anchors: list[Anchor] = []
    for name, each in plan.towers.items():
        if not (each.drop or each.losing()):
            continue
        tower, other = _tower(student, name), _tower(teacher, name)
        for layer in anchor_layers(each, tower.original):
            if layer in tower.unread:
                continue
            place = _teacher_position(teacher, name, layer)
            anchors.append(Anchor(name, layer, tower.original.index(layer), place))
        ends = (_end(tower), _end(other))
        anchors.append(Anchor(name, tower.original[ends[0]], *ends, last=True))
    return tuple(anchors)


def _end(tower: Tower) -> int:
    # LLaVA reads its vision tower before the end; what lies behind says nothing.
    read = [p for p, layer in enumerate(tower.original) if layer not in tower.unread]
    return read[-1] if read else tower.num_layers - 1
