"""What loss-greedy rules choose by: how well a model does without some of its layers.

Legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interlace.config import HealSettings
from interlace.data.collate import Collator
from interlace.data.given import as_samples
from interlace.errors import ConfigError, DataError, PlanError, check_numbers, unknown_name
from interlace.heal.model import HealModel, mean_terms
from interlace.heal.shell import make_shell
from interlace.models.handle import check_compares, check_one_device, check_vlm, to_model
from interlace.models.states import layer_input
from interlace.plan.rules import USE_LOSS
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune
from interlace.surgery.bridges.calibration import HELD_OUT_EVERY, Calibration
from interlace.surgery.bridges.names import (
    EVEN,
    FOLD,
    REFIT,
    check_bridges,
    check_token_weights,
    has_bridges,
    of_use,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from interlace.config import PruneSettings
    from interlace.data.samples import Sample
    from interlace.models import VLM
    from interlace.plan.rules import Loss

    Batches = Sequence[Mapping[str, Any]]

# What the rules of recipes and progressive runs look at, at most.
LOSS_SAMPLES = 128
# The rules that judge students with repaired cuts.
COMPENSATED, COMPENSATED_PARTS = "compensated", "compensated_parts"


class _Measure:
    """Means of the loss terms of a model over batches that are kept in memory."""

    def __init__(self, vlm: VLM, model: nn.Module, settings: HealSettings, **more: Any) -> None:
        self._vlm = vlm
        paths = {name: tower.path for name, tower in vlm.towers.items()}
        self._model = HealModel(
            model, objective=vlm.family.objective, settings=settings, paths=paths, **more
        )

    def of_teacher(self, batches: Batches) -> list[Tensor]:
        """Return what `HealModel.of_teacher` gives for each batch, on the CPU."""
        inputs = (to_model(batch, self._vlm) for batch in batches)
        return [self._model.of_teacher(each).cpu() for each in inputs]

    @torch.no_grad()
    def mean(self, batches: Batches, term: str, said: Sequence[Tensor] = ()) -> float:
        """Return the mean of a term, "ce" or "kl", in nats; `said` is what `of_teacher` gave."""
        inputs = (to_model(batch, self._vlm) for batch in batches)
        return mean_terms(self._model, inputs, self._model.count(batches), said)[term]


def _batched(vlm: VLM, data: Sequence[Sample], batch_size: int) -> Batches:
    collate = Collator.for_model(vlm)
    starts = range(0, len(data), batch_size)
    return [collate(data[start : start + batch_size]) for start in starts]


class TaskLoss:
    """The loss that healing trains on, without its distillation: cross-entropy, or contrastive.

    A skipped layer runs, and its output [B, T, D] is replaced by its input: the value is that of
    the pruned model, at the cost of the whole one. The batches are made once and stay in memory.
    """

    def __init__(self, vlm: VLM, data: Sequence[Sample], batch_size: int) -> None:
        """Prepare the batches and a shell of the model, which is left as it is.

        Args:
            vlm: the model.
            data: samples with their answers.
            batch_size: samples per forward pass; images and texts are compared within a batch.
        """
        self._batches = _batched(vlm, data, batch_size)
        shell = make_shell(vlm.model)
        self._skipped: frozenset[tuple[str, int]] = frozenset()
        for name, tower in vlm.towers.items():
            for position, layer in enumerate(shell.get_submodule(tower.path).children()):
                layer.register_forward_hook(self._skip((name, position)), with_kwargs=True)
        self._measure = _Measure(vlm, shell, HealSettings(hidden_weight=0.0, kl_weight=0.0))

    def _skip(self, place: tuple[str, int]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if place not in self._skipped:
                return None
            hidden = layer_input(args, kwargs, type(module).__name__)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def __call__(self, tower: str = "", skipped: Iterable[int] = ()) -> float:
        """Return the mean loss over all samples, in nats, without some layers of a tower.

        Args:
            tower: name of the tower.
            skipped: positions of the layers to skip.
        """
        self._skipped = frozenset((tower, position) for position in skipped)
        return self._measure.mean(self._batches, "ce")


class CompensatedLoss:
    """How far the predictions of a student with bridged cuts are from those of the whole model.

    The mean over samples of KL(whole || student) over the tokens of the answer, or over the rows
    of similarities of a contrastive model. Every call cuts the model, fits the bridges of all its
    cuts on half of the batches, and runs the student over the other half (over the same where there
    is one batch only); a cut that was asked for before costs nothing. What the whole model says to
    the answers is kept, and so is what runs in front of its towers.
    """

    def __init__(
        self,
        vlm: VLM,
        data: Sequence[Sample],
        batch_size: int,
        bridges: Any,
        token_weights: str = EVEN,
    ) -> None:
        """Prepare the batches; the model is left as it is.

        Args:
            vlm: the model.
            data: samples with their answers.
            batch_size: samples per forward pass.
            bridges: as of `prune`.
            token_weights: likewise.

        Raises:
            DataError: too few samples.
        """
        self._vlm, self._bridges, self._batch_size = vlm, bridges, batch_size
        half = len(data) // 2
        if data and has_bridges(bridges) and len(data) - half < HELD_OUT_EVERY:
            raise DataError(
                f"{len(data)} samples are too few to judge repaired students: half of them are to "
                f"repair on, and at least {HELD_OUT_EVERY} are needed for that. Give at least "
                f"{2 * HELD_OUT_EVERY - 1}, or 'sleb' as the rule, which judges without repair."
            )
        self._judged = _batched(vlm, data[:half] or data, batch_size)
        # one for all students
        (probe,) = _batched(vlm, data[half:][:1], 1)
        fitted = _batched(vlm, data[half:], batch_size)
        self._fitted = Calibration(vlm, fitted, batch_size, probe, token_weights)
        self._said: list[Tensor] = []
        self._known: dict[tuple[Any, ...], float] = {}

    def __call__(
        self, tower: str, dropped: Iterable[int], parts: Mapping[str, Iterable[int]] | None = None
    ) -> float:
        """Return the mean divergence over all samples, in nats.

        Args:
            tower: name of the tower.
            dropped: layers of the model to drop.
            parts: place in a layer -> layers that lose it whole.

        Raises:
            PlanError: layers are to go of a tower that must stay as deep as another.
            InterlaceError: as `prune` raises it.
        """
        if tower not in self._vlm.towers:
            raise ConfigError(unknown_name(f"tower of {self._vlm.name}", tower, self._vlm.towers))
        lost = {site: tuple(sorted(layers)) for site, layers in (parts or {}).items()}
        gone = tuple(sorted(dropped))
        if gone:
            self._check_depth(tower)
        key = (tower, gone, *sorted(lost.items()))
        if key not in self._known:
            number = self._vlm.towers[tower].num_layers
            cut = TowerPlan(num_layers=number, drop=gone, parts=lost)
            self._known[key] = self.of_plan(Plan(towers={tower: cut}, standard=False))
        return self._known[key]

    def _check_depth(self, tower: str) -> None:
        for group in self._vlm.family.shared_depth:
            others = [name for name in group if name != tower and name in self._vlm.towers]
            if tower in group and others:
                raise PlanError(
                    f"{self._vlm.name} must keep '{tower}' as deep as '{others[0]}', and the loss "
                    "of a repaired student is asked for one tower at a time."
                )

    def of_plan(self, plan: Plan) -> float:
        """Return the same for the student of a plan, which may cut widths too.

        Args:
            plan: as for `prune`; what is found is not kept.

        Raises:
            InterlaceError: as `prune` raises it.
        """
        vlm, bridges = self._vlm, of_use(self._bridges, plan)
        data: Any = self._fitted if has_bridges(bridges) else None
        student = prune(vlm, plan, bridges=bridges, data=data, batch_size=self._batch_size)
        measure = _Measure(
            student,
            make_shell(student.model),
            HealSettings(hidden_weight=0.0, loss_reduction="sample"),
            teacher=make_shell(vlm.model),
            teacher_paths={name: each.path for name, each in vlm.towers.items()},
        )
        self._said = self._said or measure.of_teacher(self._judged)
        return measure.mean(self._judged, "kl", self._said)


def layer_loss(
    vlm: VLM,
    data: Sequence[Sample],
    rule: str = COMPENSATED,
    *,
    batch_size: int = 8,
    bridges: str | dict[str, str] = FOLD,
    token_weights: str = EVEN,
) -> Loss:
    """Make the loss callback of a rule that chooses by it: `make_plan(..., rule=rule, loss=...)`.

    `sleb` asks for the loss of the task with layers skipped: one forward pass over the data a call.
    `compensated` and `compensated_parts` ask how far a student with repaired cuts is from the whole
    model: for every place that was cut some layers of both models over half of the data, and the
    student over the other half. What the whole model gives stays in memory.

    Args:
        vlm: the model that the plan is for; left as it is.
        data: calibration samples with their answers; apart from the data to measure on.
        rule: "compensated", "compensated_parts" or "sleb".
        batch_size: samples per forward pass; images and texts are compared within a batch.
        bridges: what repairs the cuts, as `prune` will be told; `sleb` has no use for it.
        token_weights: likewise.

    Returns:
        A function (tower, dropped layers) -> loss, in nats; but for `sleb` also of the parts that
        layers lose, as `make_plan` describes it.

    Raises:
        ConfigError: the rule asks for no loss, or the bridges or token weights are not known.
        DataError: no samples, or something else.
    """
    check_vlm(vlm, "model")
    check_numbers(batch_size=batch_size)
    if rule not in USE_LOSS:
        raise ConfigError(
            f"The rule {rule!r} asks for no loss. The rules that do are "
            f"{', '.join(sorted(USE_LOSS))}; leave loss out for the others."
        )
    check_bridges(bridges)
    check_token_weights(token_weights, bridges)
    check_one_device(vlm, f"the rule {rule!r}")
    data = as_samples(data, "data to judge layers by")
    check_compares(vlm, batch_size, len(data))
    if rule in (COMPENSATED, COMPENSATED_PARTS):
        return CompensatedLoss(vlm, data, batch_size, bridges, token_weights)
    return TaskLoss(vlm, data, batch_size)


def recipe_loss(
    vlm: VLM, data: Sequence[Sample], rule: str, settings: PruneSettings, batch_size: int
) -> Loss | None:
    """Make the loss that the rule of a recipe asks for; None where it asks for none.

    It looks at the first 128 samples, since a rule asks it very often, and judges students that
    will be refitted with their cuts folded, which chose the same layers at half the cost:
    docs/decisions/0006-default-rule.md.

    Args:
        vlm: the model that the plan is for.
        data: calibration samples.
        rule: of the plan.
        settings: of the cut.
        batch_size: samples per forward pass.
    """
    if rule not in USE_LOSS:
        return None
    bridges = settings.bridges
    if isinstance(bridges, dict):
        bridges = {name: _judged_by(kind) for name, kind in bridges.items()}
    else:
        bridges = _judged_by(bridges)
    return layer_loss(
        vlm,
        data[:LOSS_SAMPLES],
        rule,
        batch_size=batch_size,
        bridges=bridges,
        token_weights=settings.token_weights,
    )


def _judged_by(bridge: str) -> str:
    return FOLD if bridge == REFIT else bridge
