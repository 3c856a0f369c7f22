"""One stage after the other: score, plan, cut, heal, keep, measure, and go on or roll back."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from interlace._files import sha256_of
from interlace._stages import Stages, key_of
from interlace.config import HealSettings
from interlace.errors import ConfigError
from interlace.heal import heal
from interlace.heal.interpolation import split_off
from interlace.heal.sparsity import layer_importance
from interlace.heal.units import find_gated
from interlace.plan.rules import USE_LOSS
from interlace.plan.split import plan_by
from interlace.progressive.checkpoint import healing_of, is_whole, open_student, save_student
from interlace.progressive.guard import measure, retention_of
from interlace.progressive.loss import recipe_loss
from interlace.progressive.plans import after, drop_counts, gate_weight, plan_stage, whole
from interlace.progressive.schedule import gone_after, split_healing
from interlace.records import EvalReport, Plan, Scores, StageRecord
from interlace.scores import score
from interlace.surgery import prune
from interlace.surgery.bridges.names import EVEN, has_bridges, of_use

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from interlace.config import (
        PlanSettings,
        ProgressiveSettings,
        PruneSettings,
        ScoreSettings,
    )
    from interlace.data.samples import Samples
    from interlace.models import VLM
    from interlace.records import HealReport, Record, TowerPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """The arguments of a progressive run; see `interlace.progressive`."""

    vlm: VLM
    calibration: Samples
    healing: Samples
    held_out: Samples
    progressive: ProgressiveSettings
    score: ScoreSettings
    plan: PlanSettings
    prune: PruneSettings
    heal: HealSettings
    max_new_tokens: int


@dataclass(frozen=True)
class Stage:
    """A stage that was carried out; all layers count in the first model.

    Attributes:
        record: what became of it.
        plan: from the dense model to the end of this stage: drops of all stages so far.
        scores: of the model as it was before this stage.
        healed: how it was healed; None without healing.
        measured: the guard's measurement, beside the dense model.
        folder: where its student is kept.
    """

    record: StageRecord
    plan: Plan
    scores: Scores
    healed: HealReport | None
    measured: EvalReport
    folder: Path
    _dense: VLM
    _prune: PruneSettings

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Tower -> layers that are gone after this stage, in the order they went."""
        return self.record.gone

    @property
    def retention(self) -> float:
        """What the student retains of the dense model by the guard; 1 where nothing is lost."""
        return self.record.retention

    @property
    def records(self) -> tuple[Record, ...]:
        """What to export this stage's student with."""
        healed = () if self.healed is None else (self.healed,)
        return (self.plan, *healed, self.measured)

    def student(self) -> VLM:
        """Make this stage's student, healed as it was; frozen weights are the dense model's."""
        return open_student(self.folder, self._dense, self._prune)


@dataclass(frozen=True)
class _Before:
    """Where a stage starts."""

    student: VLM
    key: str
    plan: Plan | None
    gates: Mapping[str, Mapping[int, float]]


class Run:
    """Carries out the stages of a setup in an output folder."""

    def __init__(self, setup: Setup, state: Stages, dense: str) -> None:
        """Take what the stages need.

        Args:
            setup: what the run is given.
            state: of the output folder.
            dense: fingerprint of the dense model.
        """
        self.setup = setup
        self.state = state
        self.dense = dense
        self._check_gates(setup.progressive.stages)
        # the same for all stages: none trains on what another validates with
        objective = setup.vlm.family.objective
        self.training, self.validation = split_off(setup.healing, setup.heal, objective)
        self.weight = gate_weight(
            setup.plan,
            setup.progressive.gate_importance,
            gated=setup.heal.gates != "none",
        )

    def run(self) -> tuple[list[Stage], str, VLM]:
        """Carry out stage after stage.

        Returns:
            The stages, a rolled back one last; why the run ended early, empty where it did not; and
            the student of the last stage that was kept, or the dense model.
        """
        setup, limit = self.setup, self.setup.progressive.min_retention
        key = key_of(setup.vlm, self.dense)
        before = _Before(setup.vlm, key, None, {})
        # first, since the guard may name a metric that these samples do not have
        base = self._measured("dense", setup.vlm, key, None)
        scores = self._scores(1, before)
        # a single stage cuts as the plan says; several share what it drops
        gone: list[dict[str, int]] = [{}]
        if setup.progressive.stages > 1:
            counts = drop_counts(scores, setup.vlm, setup.plan)
            gone = gone_after(counts, setup.progressive.stages)
            if setup.heal.gates != "none":
                find_gated(setup.vlm, counts, setup.heal.gate_units)
        self._check_gates(len(gone))
        slices = split_healing(self.training, setup.heal, len(gone))
        done: list[Stage] = []
        for number, goal in enumerate(gone, start=1):
            had = gone[number - 2] if number > 1 else {}
            counts = {name: goal[name] - had.get(name, 0) for name in goal}
            data = None if slices is None else slices[number - 1]
            if number > 1:
                scores = self._scores(number, before)
            last = number == len(gone)
            stage, reached = self._stage(number, before, scores, counts, data, base, last=last)
            done.append(stage)
            said = stage.record.gone_text
            log.info("stage %d: retention %.4f, %s", number, stage.retention, said)
            if not stage.record.kept:
                stopped = (
                    f"Stage {number} of {len(gone)} was rolled back: it retains "
                    f"{stage.retention:.4f} of the dense model ({setup.progressive.guard}), less "
                    f"than min_retention={limit:g}. The run ends with "
                    f"{f'stage {number - 1}' if number > 1 else 'the dense model'}."
                )
                log.warning(stopped)
                return done, stopped, before.student
            before = reached
        return done, "", before.student

    def _check_gates(self, stages: int) -> None:
        if self.setup.heal.gates != "none" and stages == 1:
            raise ConfigError(
                "The last stage learns no gates, and this run has no other. Drop more layers in "
                "more stages, or set heal.gates to 'none'."
            )

    def _scores(self, number: int, before: _Before) -> Scores:
        setup = self.setup
        key = sha256_of([before.key, setup.calibration.fingerprint, setup.score.to_dict()])
        return self.state.record(
            f"stage-{number}/scores",
            Scores,
            key,
            lambda: score(
                before.student,
                setup.calibration,
                description=f"scoring, stage {number}",
                **vars(setup.score),
            ),
        )

    def _cut(
        self, number: int, before: _Before, scores: Scores, counts: Mapping[str, int]
    ) -> tuple[Plan, str]:
        """Plan what this stage alone drops. Returns the plan and its key."""
        setup = self.setup
        counts = {name: count for name, count in counts.items() if count}
        gates = before.gates if self.weight else {}
        greedy = setup.plan.rule in USE_LOSS
        key = sha256_of(
            [
                before.key,
                scores.fingerprint,
                setup.plan.to_dict(),
                counts,
                {name: list(each.items()) for name, each in gates.items()},
                self.weight,
                setup.prune.to_dict() if greedy else "",
            ]
        )

        def make() -> Plan:
            loss = recipe_loss(
                before.student,
                setup.calibration,
                setup.plan.rule,
                setup.prune,
                setup.score.batch_size,
            )
            if setup.progressive.stages == 1:
                return plan_by(setup.plan, scores, loss)
            return plan_stage(
                scores,
                before.student,
                counts,
                setup.plan,
                gates=gates,
                weight=self.weight,
                loss=loss,
            )

        return self.state.record(f"stage-{number}/plan", Plan, key, make), key

    def _stage(
        self,
        number: int,
        before: _Before,
        scores: Scores,
        counts: Mapping[str, int],
        data: Samples | None,
        base: EvalReport,
        *,
        last: bool,
    ) -> tuple[Stage, _Before]:
        setup, state = self.setup, self.state
        alone, plan_key = self._cut(number, before, scores, counts)
        cut = after(before.plan, alone)
        plan = whole(before.plan, cut, self.dense, number)
        # the gates of the last stage would have no next choice to speak in
        settings = setup.heal.replace(
            epochs=1.0,
            max_steps=None,
            validation_fraction=0.0,
            **({"gates": "none", "gate_units": HealSettings().gate_units} if last else {}),
        )
        samples = [] if data is None else [data.fingerprint, self.validation.fingerprint]
        key = sha256_of(
            [
                plan_key,
                plan.fingerprint,
                setup.prune.to_dict(),
                [*samples, settings.to_dict()] if samples else "",
            ]
        )
        name = f"stage-{number}/student"
        folder = state.folder / name
        digest = state.keys.get(name, {}).get("fingerprint", "")
        if state.is_done(name, key) and is_whole(folder, digest):
            log.info("%s: unchanged, taken from %s", name, folder)
            state.skipped.append(name)
        else:
            self._make(number, before.student, cut, plan, data, settings, key)
        student = open_student(folder, setup.vlm, setup.prune)
        healed = healing_of(folder)
        measured = self._measured(f"stage-{number}/eval", student, key, base)
        retention = retention_of(measured, setup.progressive.guard)
        limit = setup.progressive.min_retention
        record = StageRecord(
            number=number,
            drop={each: tower.drop for each, tower in cut.towers.items() if tower.drop},
            gone=plan.dropped,
            steps=healed.steps if healed is not None else 0,
            num_samples=healed.num_samples if healed is not None else 0,
            tokens=healed.tokens if healed is not None else 0,
            retention=retention,
            kept=limit is None or (retention >= limit and not math.isnan(retention)),
            plan_fingerprint=plan.fingerprint,
            parts={name: tower.parts for name, tower in plan.towers.items() if tower.parts},
            units={name: _units(tower) for name, tower in plan.towers.items() if tower.cut},
        )
        gates = {} if healed is None else layer_importance(healed)
        stage = Stage(record, plan, scores, healed, measured, folder, setup.vlm, setup.prune)
        return stage, _Before(student, key, plan, gates)

    def _make(
        self,
        number: int,
        student: VLM,
        cut: Plan,
        plan: Plan,
        data: Samples | None,
        settings: HealSettings,
        key: str,
    ) -> None:
        """Cut and heal the student of a stage, and keep it."""
        setup, state = self.setup, self.state
        bridges = of_use(setup.prune.bridges, cut)
        weighed = setup.prune.token_weights if has_bridges(bridges) else EVEN
        made = prune(
            student,
            cut,
            data=setup.calibration if has_bridges(bridges) else None,
            batch_size=setup.score.batch_size,
            **{**vars(setup.prune), "bridges": bridges, "token_weights": weighed},
        )
        made.plan = plan
        if made.record is not None:
            links = {**made.record.inputs, "model": self.dense, "plan": plan.fingerprint}
            made.record = replace(made.record, plan_fingerprint=plan.fingerprint, inputs=links)
        checkpoints = state.folder / f"stage-{number}" / "healing" / key[:12]
        healed = None
        if data is not None:
            healed = heal(
                made,
                teacher=setup.vlm,
                data=data,
                validation=self.validation or None,
                settings=settings,
                output=checkpoints,
                resume=checkpoints.exists(),
            )
        name = f"stage-{number}/student"
        digest = save_student(state.folder / name, made, setup.vlm, healed)
        state.mark(name, key, digest)
        # the optimizer's state is of no use any more, and larger than the student
        shutil.rmtree(checkpoints.parent, ignore_errors=True)

    def _measured(self, name: str, vlm: VLM, key: str, base: EvalReport | None) -> EvalReport:
        setup, guard = self.setup, self.setup.progressive.guard
        sizes = {"batch_size": setup.score.batch_size, "max_new_tokens": setup.max_new_tokens}
        made_of = [key, guard, setup.held_out.fingerprint, sizes]
        return self.state.record(
            name,
            EvalReport,
            sha256_of([*made_of, base.fingerprint if base is not None else ""]),
            lambda: measure(vlm, guard, setup.held_out, base, **sizes),
        )


def _units(tower: TowerPlan) -> dict[str, int]:
    """How many heads or neurons go at every place, all layers together."""
    return {place: sum(map(len, layers.values())) for place, layers in tower.cut.items()}
