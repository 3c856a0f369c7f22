"""The whole flow from one recipe: score, plan, prune, heal, evaluate, export.

Every stage leaves a record in the output folder. A second run skips the stages whose record exists
and still belongs to the same model, data and settings; a run that was killed while healing goes on
from its last checkpoint.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interlace._files import check_new_checkpoint, remove_parts, sha256_of
from interlace._fused_evaluation import evaluate_fused
from interlace._launch import check_single_process
from interlace._recipe_checks import check_names, check_towers
from interlace._stages import Stages, key_of
from interlace._torch_utils import default_device
from interlace.config import (
    DataSettings,
    EvalSettings,
    ProgressiveSettings,
    Recipe,
)
from interlace.data.samples import Samples, samples, scenes_tasks, split_to_measure
from interlace.errors import ConfigError, PlanError
from interlace.evaluate import evaluate
from interlace.evaluate.selection import check_models
from interlace.export import export
from interlace.heal import heal
from interlace.heal.checks import check_device, check_half, check_learnable_data
from interlace.heal.units import find_gated
from interlace.models import VLM, open_model
from interlace.plan.rules import USE_LOSS
from interlace.plan.split import plan_by
from interlace.progressive import progressive
from interlace.progressive.guard import check_guard, held_out_scenes
from interlace.progressive.loss import recipe_loss
from interlace.records import EvalReport, HealReport, Plan, ProgressiveRecord, Record, Scores
from interlace.scores import score
from interlace.surgery import prune
from interlace.surgery.bridges.names import has_bridges

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["RunResult", "run"]

log = logging.getLogger(__name__)

SCENES_HEAL_COUNT = 4096
# folder of the exported checkpoint in that of the run
MODEL = "model"


@dataclass(frozen=True)
class RunResult:
    """What a run of the whole flow made.

    Attributes:
        folder: the exported checkpoint.
        scores: of the dense model.
        plan: what was dropped, tuned and frozen.
        healed: how healing went, in the last stage of a progressive run; None where the recipe
            skips it.
        raw: the student before healing, beside the dense model; None for a progressive run.
        result: the finished student, beside the dense model.
        skipped: names of the stages that were taken from an earlier run.
        progressive: the stages of a progressive run.
    """

    folder: Path
    scores: Scores
    plan: Plan
    healed: HealReport | None
    raw: EvalReport | None
    result: EvalReport
    skipped: tuple[str, ...]
    progressive: ProgressiveRecord | None = None


def _samples(settings: DataSettings, vlm: VLM, **choice: Any) -> Samples:
    """Read samples from the recipe's source; `choice` says which and how many, or where else."""
    place = {"source": settings.source, "root": settings.root, "tasks": settings.tasks} | choice
    if place["source"] == "scenes" and place["tasks"] is None:
        place["tasks"] = scenes_tasks(vlm.family.objective)
    return samples(
        place.pop("source"),
        processor=vlm.processor,
        max_bad_fraction=settings.max_bad_fraction,
        **place,
    )


def _calibration(settings: DataSettings, vlm: VLM) -> Samples:
    choice = {"split": settings.split, "seed": settings.seed}
    return _samples(settings, vlm, count=settings.calibration_count, **choice)


def _healing(settings: DataSettings, vlm: VLM) -> Samples:
    count = settings.heal_count
    if count is None and settings.source == "scenes":
        count = SCENES_HEAL_COUNT
    # healing must not see the scenes that chose the layers once more
    choice = {"split": settings.split, "seed": settings.seed + 1}
    return _samples(settings, vlm, count=count, **choice)


def _measured(data: DataSettings, settings: EvalSettings, vlm: VLM) -> dict[str, Samples] | None:
    place = {} if settings.source is None else {"source": settings.source, "root": settings.root}
    source = settings.source or data.source
    if source == "scenes":
        return None
    # whatever the layers are chosen by, a task takes the samples that it can measure
    choice = {
        "count": settings.count,
        "split": split_to_measure(source, settings.split),
        "seed": settings.seed,
        "tasks": None,
    }
    held_out = _samples(data, vlm, **choice, **place)
    return dict.fromkeys(settings.tasks, held_out)


def _measure(
    settings: Recipe, vlm: VLM, held_out: Mapping[str, Samples] | None
) -> tuple[dict[str, Any], list[Any]]:
    """Arguments of the evaluation, and what its record is made from."""
    measure: dict[str, Any] = {
        "tasks": settings.eval.tasks,
        "data": held_out,
        "baseline": vlm,
        "batch_size": settings.eval.batch_size,
        "max_new_tokens": settings.eval.max_new_tokens,
        "count": settings.eval.count,
        "seed": settings.eval.seed,
        "split": settings.eval.split or "test",
    }
    inputs: list[Any] = [settings.eval.to_dict(), settings.data.to_dict()]
    if held_out is not None:
        inputs += [each.fingerprint for each in held_out.values()]
    if "speed" in settings.eval.tasks:
        inputs.append(vlm.device.type)
    return measure, inputs


def _warn_of_overlap(held_out: Mapping[str, Samples] | None, *seen: Samples) -> None:
    """Warn where samples to measure on were also used to score or heal."""
    if not held_out:
        return
    # a sample has no name outside of its source, so what is said in it tells it apart; as another
    # task it has other references
    known = {(each.id, each.turns) for samples in seen for each in samples}
    measured = next(iter(held_out.values()))
    shared = sum((each.id, each.turns) in known for each in measured)
    if shared:
        log.warning(
            "%d of the %d samples to measure on were also used to score or heal, so the figures "
            "flatter the student. Measure on another split ([eval] split) or source ([eval] "
            "source).",
            shared,
            len(measured),
        )


def run(
    recipe: Recipe | str | os.PathLike[str], output: str | os.PathLike[str] = "interlace-run"
) -> RunResult:
    """Run the whole flow and leave a finished checkpoint.

    Args:
        recipe: a `Recipe`, or the path of a TOML file of one.
        output: folder for the records, the healing checkpoints and, under `model/`, the exported
            checkpoint. A folder of an earlier run is continued.

    Returns:
        The records, and where the checkpoint is.

    Raises:
        InterlaceError: as the stages raise it; finished stages stay.
    """
    if not isinstance(recipe, (Recipe, str, os.PathLike)):
        raise ConfigError(
            f"The recipe is a {type(recipe).__name__}; give a Recipe (Recipe.from_dict makes one "
            "of nested dicts) or the path of a TOML file."
        )
    check_single_process("A recipe")
    settings = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    check_names(settings)
    stages = Stages(output)
    _check_target(stages.folder / MODEL, stages, settings)
    vlm = open_model(
        settings.model.path,
        dtype=settings.model.dtype,
        device=settings.model.device or default_device(),
        trust_remote_code=settings.model.trust_remote_code,
    )
    check_towers(settings, vlm)
    check_models(vlm, vlm, settings.eval.tasks)
    if settings.heal.trains:
        check_device(vlm)
        check_half(vlm)
    if settings.progressive is not None:
        check_guard(settings.progressive.guard, vlm)
    calibration = _calibration(settings.data, vlm)
    with stages.alone():
        if settings.progressive is None:
            return _run_once(settings, vlm, calibration, stages)
        return _run_progressive(settings, settings.progressive, vlm, calibration, stages)


def _run_once(settings: Recipe, vlm: VLM, calibration: Samples, stages: Stages) -> RunResult:
    """Do the flow with a single cut."""
    model_key = key_of(vlm, vlm.fingerprint)
    scores_key = sha256_of([model_key, calibration.fingerprint, settings.score.to_dict()])
    scores = stages.record(
        "scores",
        Scores,
        scores_key,
        lambda: score(vlm, calibration, **vars(settings.score)),
    )
    # a rule that asks for the loss asks for that of a student cut like this one
    asked = settings.prune.to_dict() if settings.plan.rule in USE_LOSS else ""
    plan_key = sha256_of([scores.fingerprint, settings.plan.to_dict(), asked])

    def choose() -> Plan:
        rule, size = settings.plan.rule, settings.score.batch_size
        loss = recipe_loss(vlm, calibration, rule, settings.prune, size)
        return plan_by(settings.plan, scores, loss)

    plan = stages.record("plan", Plan, plan_key, choose)
    made_of = [model_key, plan_key, settings.prune.to_dict(), settings.score.batch_size]
    prune_key = sha256_of(made_of)

    # made when a stage asks for it: a run that skips them all cuts and heals nothing
    @functools.cache
    def student() -> VLM:
        data = calibration if has_bridges(settings.prune.bridges) else None
        size = settings.score.batch_size
        made = prune(vlm, plan, data=data, batch_size=size, **vars(settings.prune))
        if settings.heal.trains and settings.heal.gates != "none":
            # what healing would refuse only once the student is measured
            find_gated(made, plan.towers, settings.heal.gate_units)
        return made

    held_out = _measured(settings.data, settings.eval, vlm)
    healing = None
    if settings.heal.trains:
        healing = _healing(settings.data, vlm)
        check_learnable_data(vlm, settings.heal.batch_size, healing)
    _warn_of_overlap(held_out, calibration, *([healing] if healing is not None else []))
    measure, eval_inputs = _measure(settings, vlm, held_out)
    raw_key = sha256_of([prune_key, *eval_inputs])
    measured = evaluate_fused if settings.eval.fuse else evaluate
    raw = stages.record("eval_raw", EvalReport, raw_key, lambda: measured(student(), **measure))

    healed: HealReport | None = None
    heal_key = ""
    if healing is not None:
        heal_key = sha256_of([prune_key, healing.fingerprint, settings.heal.to_dict()])
        checkpoints = stages.folder / "healing" / heal_key[:12]

        # an unfinished run goes on; a finished one only gives its weights back
        @functools.cache
        def run_healing() -> HealReport:
            return heal(
                student(),
                teacher=vlm,
                data=healing,
                settings=settings.heal,
                output=checkpoints,
                resume=checkpoints.exists(),
            )

        healed = stages.record("heal", HealReport, heal_key, run_healing)

    def finished() -> VLM:
        if healing is not None:
            run_healing()
        return student()

    eval_key = sha256_of([prune_key, heal_key, *eval_inputs])
    result = stages.record("eval", EvalReport, eval_key, lambda: measured(finished(), **measure))

    records = [scores, plan, *([healed] if healed else []), result]
    target = stages.folder / MODEL
    _export(finished, target, records, eval_key, stages, settings)
    return RunResult(target, scores, plan, healed, raw, result, tuple(stages.skipped))


def _check_target(target: Path, stages: Stages, settings: Recipe) -> tuple[str, bool]:
    """Refuse a folder to export to that exists and is not this run's own to replace.

    Returns:
        The name of the stage that exports to it, and whether the folder may be replaced.

    Raises:
        ConfigError: as `check_new_checkpoint` raises it.
    """
    # the last stage is "export", whatever its folder is called; others are named after theirs
    name = "export" if target.name == MODEL else f"export/{target.name}"
    # what an earlier run of this recipe made
    replace = settings.export.overwrite or name in stages.keys
    check_new_checkpoint(target, overwrite=replace, inputs=(settings.model.path,))
    return name, replace


def _export(
    student: Callable[[], VLM],
    target: Path,
    records: list[Record],
    made_of: str,
    stages: Stages,
    settings: Recipe,
) -> None:
    """Export a student, unless the folder is there and still belongs to what it is made of."""
    name, replace = _check_target(target, stages, settings)
    key = sha256_of([made_of, [record.fingerprint for record in records], settings.export.verify])
    if stages.is_done(name, key) and target.exists():
        log.info("%s: unchanged, %s", name, target)
        stages.skipped.append(name)
        return
    remove_parts(target)
    # noted before the folder is there, so that a run killed in between knows it for its own
    stages.mark(name, "")
    export(student(), target, records=records, overwrite=replace, verify=settings.export.verify)
    stages.mark(name, key)


def _run_progressive(
    settings: Recipe,
    chosen: ProgressiveSettings,
    vlm: VLM,
    calibration: Samples,
    stages: Stages,
) -> RunResult:
    """Do the flow with scoring, cutting and healing in stages; see `interlace.progressive`."""
    smaller = {
        number: stages.folder / f"model-stage-{number}"
        for number in range(1, chosen.stages if chosen.export_stages else 1)
    }
    for folder in smaller.values():
        _check_target(folder, stages, settings)
    held_out = _measured(settings.data, settings.eval, vlm)
    healing = _healing(settings.data, vlm)
    _warn_of_overlap(held_out, calibration, healing)
    if held_out is not None:
        guarded = next(iter(held_out.values()))
    else:
        # other scenes than those of the evaluation, which must not choose what is evaluated
        guarded = held_out_scenes(
            vlm,
            chosen.guard,
            count=settings.eval.count,
            seed=settings.eval.seed + 1,
            split=settings.eval.split or "test",
        )
    made = progressive(
        vlm,
        calibration=calibration,
        healing=healing,
        held_out=guarded,
        output=stages.folder / "progressive",
        settings=chosen,
        score=settings.score,
        plan=settings.plan,
        prune=settings.prune,
        heal=settings.heal,
        max_new_tokens=settings.eval.max_new_tokens,
    )
    stages.skipped += made.skipped
    if not made.stages:
        raise PlanError(
            f"{made.stopped} So there is no student to hand over. Drop fewer layers, take more "
            "stages, heal longer, or lower min_retention."
        )
    last = made.stages[-1]
    measure, eval_inputs = _measure(settings, vlm, held_out)
    model_key = key_of(vlm, made.record.inputs["model"])
    key = sha256_of([made.record.fingerprint, model_key, *eval_inputs])
    measured = evaluate_fused if settings.eval.fuse else evaluate
    result = stages.record("eval", EvalReport, key, lambda: measured(made.student, **measure))
    for stage in made.stages[:-1]:
        if stage.record.number in smaller:
            folder = smaller[stage.record.number]
            about = sha256_of([stage.plan.fingerprint, model_key])
            _export(stage.student, folder, list(stage.records), about, stages, settings)
    target = stages.folder / MODEL
    records = [*made.records, result]
    _export(lambda: made.student, target, records, key, stages, settings)
    skipped = tuple(stages.skipped)
    return RunResult(
        target, made.stages[0].scores, last.plan, last.healed, None, result, skipped, made.record
    )
