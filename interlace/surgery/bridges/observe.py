"""Teacher and student side by side at one gap, batch by batch.

Legend: N tokens that count, D width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import DataError, ShapeError
from interlace.models.states import watch_state
from interlace.surgery.bridges.resting import Forms, Start, idling, starting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from interlace.surgery.bridges.calibration import Calibration, TokenWeights
    from interlace.surgery.bridges.gaps import Gap


@dataclass(frozen=True)
class Seen:
    """What one run of a tower shows at a gap.

    Attributes:
        goal: what the teacher has behind the removed layers, [N, D].
        state: what the student has there, as the layer behind the gap is given it, [N, D].
        inputs: inputs of the modules that were asked for, [N, ...] each.
        weight: what the tokens count, [N] fp64, above 0.
        held: tokens of held-out samples, [N] bool.
    """

    goal: torch.Tensor
    state: torch.Tensor
    inputs: dict[str, torch.Tensor]
    weight: torch.Tensor
    held: torch.Tensor


@dataclass
class Reached:
    """Up to where the two models are known at all batches: the next look begins there.

    Attributes:
        teacher: at the goal of the last gap.
        student: at the layer before it, which may have been changed since.
        forms: of what layers of both give, as of `idling`.
    """

    teacher: Start = field(default_factory=Start)
    student: Start = field(default_factory=Start)
    forms: Forms = field(default_factory=dict)

    def move(
        self, gap: Gap, goals: list[torch.Tensor], before: list[torch.Tensor], depth: int
    ) -> None:
        """Take over what was seen at a gap of a teacher of some depth."""
        if gap.goal < depth:
            self.teacher = Start(gap.goal, goals)
        if gap.position:
            self.student = Start(gap.position - 1, before)


@dataclass(frozen=True)
class Pair:
    """One tower before and after a cut, and what both models are run on.

    Attributes:
        teacher: the model before the cut; only read.
        student: the model after it, as repaired so far.
        calibration: the batches.
        weights: of the tokens of this tower.
        reached: up to where both are known. Gaps are looked at front to back, and a repair changes
            nothing in front of the layer before its gap.
    """

    teacher: nn.Module
    student: nn.Module
    calibration: Calibration
    weights: TokenWeights
    reached: Reached = field(default_factory=Reached)


def _collecting(
    layers: nn.ModuleList, position: int, name: str, into: list[torch.Tensor]
) -> RemovableHandle:
    """Set a hook that puts h_position of every run of a tower into a list."""
    # a layer may go on to work in place
    return watch_state(layers, position, name, lambda hidden: into.append(hidden.clone()))


def observe(pair: Pair, gap: Gap, modules: Mapping[str, nn.Module] | None = None) -> Iterator[Seen]:
    """Run both models over all batches; `pair.reached` is then at this gap.

    Args:
        pair: the models and the batches.
        gap: where to look.
        modules: modules of the student whose inputs are wanted too, by any name.

    Raises:
        ShapeError: the two do not run the tower over the same tokens.
        DataError: a state is not finite.
    """
    goals: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    before: list[torch.Tensor] = []
    teacher, student, reached = pair.teacher, pair.student, pair.reached
    passed: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in modules or {}}
    pair.weights.restart()
    with contextlib.ExitStack() as stack:
        for model, position, into, start in (
            (teacher, gap.goal, goals, reached.teacher),
            (student, gap.position, states, reached.student),
        ):
            layers: Any = model.get_submodule(gap.path)
            stack.enter_context(starting(layers, start, gap.tower, reached.forms))
            stack.enter_context(_collecting(layers, position, gap.tower, into))
            stack.enter_context(idling(layers[position:], gap.tower, reached.forms))
        if gap.position:
            stack.enter_context(_collecting(layers, gap.position - 1, gap.tower, before))
        for name, module in (modules or {}).items():
            keep = inputs[name]
            hook = module.register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0]))
            stack.enter_context(hook)
        for batch in pair.calibration.batches:
            for each in (goals, states, before, *inputs.values()):
                each.clear()
            pair.calibration.run(teacher, batch)
            pair.calibration.run(student, batch)
            if any(len(each) != len(goals) for each in (states, *inputs.values())):
                raise ShapeError(
                    f"The {gap.tower} tower runs {len(goals)} times per batch in the dense model, "
                    f"but its layers in the student {len(states)} times, so the two cannot be "
                    "compared. Bridge the other towers only."
                )
            for run, (goal, state) in enumerate(zip(goals, states, strict=True)):
                caught = {name: each[run] for name, each in inputs.items()}
                yield _select(gap, goal, state, caught, *pair.weights.of(batch, goal, gap.goal))
            for kept, new in zip(passed, (goals, before), strict=True):
                kept += [each.cpu() for each in new]
    whole: Any = teacher.get_submodule(gap.path)
    reached.move(gap, *passed, depth=len(whole))


def _select(
    gap: Gap,
    goal: torch.Tensor,
    state: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
    held: torch.Tensor,
) -> Seen:
    """Leave out the tokens that do not count."""
    counts = weight > 0

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(len(counts), -1)[counts]

    seen = Seen(
        rows(goal),
        rows(state),
        {name: rows(each) for name, each in inputs.items()},
        weight[counts],
        held[counts],
    )
    check_finite((seen.goal, seen.state, *seen.inputs.values()), f"at the cut of {gap}")
    return seen


def check_finite(tensors: Iterable[torch.Tensor], where: str) -> None:
    """Refuse activations that are not finite.

    Raises:
        DataError: one of the tensors holds NaN or infinity; `where` says where that is.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise DataError(
            f"NaN or infinite activations {where}. Open the model in another dtype (float16 "
            "overflows where bfloat16 and float32 do not), or check its weights and the data."
        )
