"""progressive: the verb. It checks what it is given, runs the stages, and hands over the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interlace._launch import check_single_process
from interlace._recommended import RECOMMENDED_HEAL, RECOMMENDED_PLAN, RECOMMENDED_PRUNE
from interlace._stages import Stages
from interlace.config import (
    HealSettings,
    PlanSettings,
    ProgressiveSettings,
    PruneSettings,
    ScoreSettings,
)
from interlace.data.given import as_samples
from interlace.errors import ConfigError, check_numbers
from interlace.heal.checks import check_device, check_half, check_learnable_data
from interlace.models.handle import check_vlm
from interlace.plan.rules import check_use, find_rule
from interlace.plan.split import check_settings
from interlace.plan.widths import check_width_settings, needed_metrics
from interlace.progressive.guard import check_guard, held_out_scenes
from interlace.progressive.loss import COMPENSATED, COMPENSATED_PARTS
from interlace.progressive.stages import Run, Setup, Stage
from interlace.records import ProgressiveRecord, Provenance
from interlace.surgery.bridges.names import RUN_TIME, check_bridges

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from interlace.data.samples import Sample
    from interlace.models import VLM
    from interlace.records import Record

RECORD = "progressive.json"
HELD_OUT = 256


@dataclass(frozen=True)
class ProgressiveResult:
    """What a progressive run made.

    Attributes:
        student: of the last stage that was kept; the dense model itself where the first stage was
            rolled back.
        stages: the stages that were kept. Each holds a smaller cut of the same run, and
            `stages[i].student()` gives its student.
        rolled_back: the stage that lost too much; None where none did.
        record: all of this as a record.
        skipped: names of what was taken from an earlier run.
    """

    student: VLM
    stages: tuple[Stage, ...]
    rolled_back: Stage | None
    record: ProgressiveRecord
    skipped: tuple[str, ...]

    @property
    def stopped(self) -> str:
        """Why the run ended before its last stage; empty where it did not."""
        return self.record.stopped

    @property
    def records(self) -> tuple[Record, ...]:
        """What to export the student with."""
        return (*self.stages[-1].records, self.record) if self.stages else (self.record,)


def progressive(
    vlm: VLM,
    *,
    calibration: Sequence[Sample],
    healing: Sequence[Sample],
    output: str | os.PathLike[str],
    held_out: Sequence[Sample] | None = None,
    drop_fraction: float | dict[str, float] | None = None,
    parameters: float | dict[str, float] | None = None,
    rule: str | None = None,
    stages: int | None = None,
    min_retention: float | None = None,
    settings: ProgressiveSettings | None = None,
    score: ScoreSettings | None = None,
    plan: PlanSettings | None = None,
    prune: PruneSettings | None = None,
    heal: HealSettings | None = None,
    max_new_tokens: int = 64,
) -> ProgressiveResult:
    """Drop layers in several stages, and heal and score again in each.

    A stage scores the student as it is, drops a few of the layers that are left, trains what the
    plans of this and the earlier stages tune, and is measured on held-out samples. The layers that
    are gone follow a cosine schedule; after the last stage they are as many as one cut of
    `drop_fraction` would take. The teacher of every stage is the dense model. Layers count in the
    first model throughout.

    `heal` states the whole budget: the stages share the samples of one healing run of these
    settings, in its order, each taking three times the steps of the one before, so that a
    progressive run heals on exactly the tokens of a single cut. Each stage has a warm-up and a
    schedule of its own.

    The output folder keeps the student of every stage. A run that was killed goes on there: call
    again with the same arguments. On a CPU with as many threads the result is the same, bit for
    bit.

    Args:
        vlm: the dense model; left as it is.
        calibration: samples to score with and to fit bridges on; rules that choose by the loss take
            it from the first 128 of them.
        healing: samples to heal with.
        output: folder of the run.
        held_out: samples to measure stages on; default: 256 of the built-in scenes. Measure the
            result on others where a stage can be rolled back.
        drop_fraction: share of the layers to drop in all, 0..1, or one per tower; instead of that
            in `plan`.
        parameters: share of the parameters of the layers to take out in a single stage, as layers,
            heads and neurons together (`split_plan`), instead of what `plan` drops. Keeps most.
        rule: name of the rule, instead of that in `plan`; default without `plan`: "compensated".
            Rules that choose by the loss need no callback here. "compensated_parts", in a single
            stage, keeps more, in a checkpoint that only `open_model` opens.
        stages: number of stages, at least 1, instead of that in `settings`.
        min_retention: see `ProgressiveSettings`; instead of that in `settings`.
        settings: of the stages; default: `ProgressiveSettings()`.
        score: how to score; default: `ScoreSettings()` with the metrics that the plan needs. Its
            batch size is also that of the loss and of measuring.
        plan: what to drop in all and by what rule; default: a quarter by "compensated".
        prune: how to cut; default: with the bridge "refit". Bridges are fitted on `calibration`,
            each stage's on the student it cuts; those at run time are refused.
        heal: how to heal in all; default:
            `HealSettings(hidden_weight=20.0, validation_fraction=0.05)`, which suits cuts that
            are repaired. With gates, all stages but the last learn them.
        max_new_tokens: longest answer where the guard's task generates.

    Returns:
        The result. A stage that retains less than `min_retention` is rolled back and ends the run:
        `stopped` and the log say so.

    Raises:
        ConfigError: arguments that do not fit together; a plan that cuts within layers in several
            stages; gates in a single stage, or in a tower that cannot be gated; fewer optimiser
            steps than stages; an output that is a file.
        PlanError: a stage has no plan. Finished stages stay in the folder.
        InterlaceError: as the verbs of the stages raise it.

    Source: cosine schedule: UPop (arXiv 2301.13741). Gates: see `interlace.heal.sparsity`.
    """
    check_single_process("progressive")
    check_vlm(vlm, "model")
    calibration = as_samples(calibration, "calibration data")
    healing = as_samples(healing, "healing data")
    for given, kind in (
        (settings, ProgressiveSettings),
        (score, ScoreSettings),
        (plan, PlanSettings),
        (prune, PruneSettings),
        (heal, HealSettings),
    ):
        if given is not None and not isinstance(given, kind):
            raise ConfigError(
                f"A {type(given).__name__} was given for {kind.__name__}; give such settings, or "
                "leave them out."
            )
    check_numbers(max_new_tokens=max_new_tokens)
    chosen = _given(settings or ProgressiveSettings(), stages=stages, min_retention=min_retention)
    planned = plan or RECOMMENDED_PLAN
    if drop_fraction is not None:
        planned = planned.replace(drop_fraction=drop_fraction, num_drop=None)
    if parameters is not None:
        # beside a drop_fraction of the caller's own it is refused
        planned = planned.replace(parameters=parameters, drop_fraction=drop_fraction, num_drop=None)
    planned = _given(planned, rule=rule)
    find_rule(planned.rule)
    if score is None:
        score = ScoreSettings(metrics=("similarity", *needed_metrics(planned)))
    check_amounts(planned, chosen.stages, score.metrics)
    cut = prune or RECOMMENDED_PRUNE
    _check_prune(cut)
    check_guard(chosen.guard, vlm)
    healed = heal or RECOMMENDED_HEAL
    if healed.trains:
        check_device(vlm)
        check_half(vlm)
        check_learnable_data(vlm, healed.batch_size, healing)
    if held_out is None:
        held_out = held_out_scenes(vlm, chosen.guard, count=HELD_OUT, seed=1, split="test")
    held_out = as_samples(held_out, "held-out data")
    state = Stages(output)
    dense = vlm.fingerprint
    setup = Setup(
        vlm=vlm,
        calibration=calibration,
        healing=healing,
        held_out=held_out,
        progressive=chosen,
        score=score,
        plan=planned,
        prune=cut,
        heal=healed,
        max_new_tokens=max_new_tokens,
    )
    work = Run(setup, state, dense)
    with state.alone():
        done, stopped, student = work.run()
    record = ProgressiveRecord(
        stages=tuple(stage.record for stage in done),
        guard=chosen.guard,
        min_retention=chosen.min_retention,
        stopped=stopped,
        model_name=vlm.name,
        settings={
            "progressive": chosen.to_dict(),
            "score": setup.score.to_dict(),
            "plan": planned.to_dict(),
            "prune": setup.prune.to_dict(),
            "heal": healed.to_dict(),
        },
        inputs={
            "model": dense,
            "calibration": calibration.fingerprint,
            "healing": healing.fingerprint,
            "held_out": held_out.fingerprint,
        },
        provenance=Provenance.collect(planned.seed),
    )
    record.save(state.folder / RECORD)
    kept = tuple(stage for stage in done if stage.record.kept)
    return ProgressiveResult(
        student=student,
        stages=kept,
        rolled_back=done[-1] if stopped else None,
        record=record,
        skipped=tuple(state.skipped),
    )


def check_amounts(settings: PlanSettings, stages: int, scored: Sequence[str]) -> None:
    """Refuse a plan that cuts within layers in several stages, or by metrics that are not scored.

    Args:
        settings: of the plan.
        stages: number of stages; a single one takes all that one cut can.
        scored: metrics that are scored.

    Raises:
        ConfigError: says what, and what to do.
        PlanError: weights for a rule that has no use for them.
    """
    check_use(
        settings.rule,
        settings.weights,
        settings.group,
        drops=settings.drops or settings.parameters is not None,
    )
    if stages == 1:
        check_settings(settings)
        check_width_settings(settings, scored)
        return
    if settings.rule == COMPENSATED_PARTS:
        raise ConfigError(
            f"The rule '{settings.rule}' takes parts out of layers, but {stages} stages count what "
            f"is left to drop in whole layers. Take stages=1, or the rule '{COMPENSATED}'."
        )
    for name in ("parameters", "heads", "ffn", "graft", "attention_parts", "ffn_parts"):
        if getattr(settings, name) is not None:
            raise ConfigError(
                f"{name} is set in the plan, but {stages} stages drop whole layers only: the share "
                "would be cut anew in every stage. Take stages=1, or leave it out."
            )


def _check_prune(settings: PruneSettings) -> None:
    bridges = settings.bridges
    check_bridges(bridges)
    for name in bridges.values() if isinstance(bridges, dict) else [bridges]:
        if name in RUN_TIME:
            raise ConfigError(
                f"The bridge '{name}' is a module at run time, and progressive makes students that "
                "can be cut again. Take 'refit', 'fold' or 'scale', which go into the weights."
            )


def _given(settings: Any, **values: Any) -> Any:
    """Replace settings by those of `values` that are not None."""
    return settings.replace(**{name: v for name, v in values.items() if v is not None})
