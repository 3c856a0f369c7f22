"""The command `progressive`: the whole flow with repaired cuts, in one stage or several."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads it at run time)
from typing import Annotated, Any

import typer

from interlace._cli import (
    WEIGHED,
    Bridges,
    Count,
    Data,
    Device,
    Dtype,
    HiddenWeight,
    MaxBad,
    Model,
    Overwrite,
    Remote,
    Root,
    Split,
    WidthMetrics,
    judges,
    output_option,
    read_bridges,
    say_result,
    split_names,
)
from interlace._recommended import RECOMMENDED_HEAL, RECOMMENDED_PLAN, RECOMMENDED_PRUNE
from interlace.plan.rules import rule_names
from interlace.plan.widths import needed_metrics
from interlace.surgery.bridges.names import EVEN, has_bridges


def progressive(
    model: Model,
    output: Annotated[Path, output_option("Folder of the run; the model goes to model/ in it.")],
    drop_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the layers to drop in all, 0..1. Default: 0.25."),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(
            help="Instead: share of their parameters, 0..1, as layers, heads and neurons together, "
            "in a single stage. Keeps most."
        ),
    ] = None,
    fixed_time: Annotated[
        float,
        typer.Option(
            help="With --parameters: share of a layer's time, 0 to below 1, that passes whatever "
            "its width. Above 0, as much time goes as whole layers of that share take."
        ),
    ] = 0.0,
    width_metrics: WidthMetrics = None,
    stages: Annotated[int, typer.Option(min=1, help="Number of stages.")] = 1,
    rule: Annotated[
        str, typer.Option(help=f"How layers are chosen: {', '.join(rule_names())}.")
    ] = RECOMMENDED_PLAN.rule,
    bridges: Bridges = str(RECOMMENDED_PRUNE.bridges),
    token_weights: Annotated[
        str | None,
        typer.Option(
            help=f"{WEIGHED} Default: {RECOMMENDED_PRUNE.token_weights} where there are bridges."
        ),
    ] = None,
    min_retention: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Roll back a stage that keeps less than this, 0..1."),
    ] = None,
    guard: Annotated[
        str, typer.Option(help="What is kept: loss, or a task and metric such as vqa/accuracy.")
    ] = "loss",
    gates: Annotated[
        str, typer.Option(help="Sparse regularisation in healing: none, l1 or hard_concrete.")
    ] = "none",
    gate_units: Annotated[
        str, typer.Option(help="What gates stand on, comma separated: branches, heads, neurons.")
    ] = "branches",
    export_stages: Annotated[
        bool, typer.Option("--export-stages", help="Also export the student of every stage.")
    ] = False,
    tower: Annotated[
        str | None, typer.Option(help="Towers, comma separated. Default: text, or all.")
    ] = None,
    data: Data = "scenes",
    root: Root = None,
    split: Split = None,
    calibration_count: Count = 512,
    heal_count: Count = 4096,
    max_bad_fraction: MaxBad = 0.01,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of healing.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per pass of healing.")] = 16,
    hidden_weight: HiddenWeight = RECOMMENDED_HEAL.hidden_weight,
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.5,
            help="Share of the samples that is not trained on and says how far healing goes. "
            f"Default: {RECOMMENDED_HEAL.validation_fraction:g}, 0 with gates.",
        ),
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints of healing.")
    ] = None,
    task: Annotated[str, typer.Option(help="What to measure at the end.")] = "fidelity",
    count: Count = 256,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Seed of the choice of samples, of rules that draw and of healing, but not of the "
            "samples to measure on. Default: those of a recipe.",
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    overwrite: Overwrite = False,
) -> None:
    """Drop layers with their cuts repaired, in one stage or several that heal and measure again.

    Run it again with the same options and it goes on where it stopped. A recipe with a section
    [progressive] for `interlace run` sets more.
    """
    from interlace.config import PlanSettings, Recipe
    from interlace.pipeline import run as run_flow

    wanted = read_bridges(bridges)
    if token_weights is None:
        token_weights = RECOMMENDED_PRUNE.token_weights if has_bridges(wanted) else EVEN
    if validation_fraction is None:
        gated = gates != "none"
        validation_fraction = 0.0 if gated else RECOMMENDED_HEAL.validation_fraction
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "path": model,
            "dtype": dtype,
            "device": device,
            "trust_remote_code": trust_remote_code,
        },
        "data": {
            "source": data,
            "root": root,
            "split": split,
            "calibration_count": calibration_count,
            "heal_count": heal_count,
            "max_bad_fraction": max_bad_fraction,
        },
        "plan": {
            "drop_fraction": drop_fraction,
            "parameters": parameters,
            "fixed_time": fixed_time,
            "rule": rule,
            "towers": split_names(tower),
            "width_metrics": judges(width_metrics),
        },
        "prune": {"bridges": wanted, "token_weights": token_weights},
        "heal": {
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "hidden_weight": hidden_weight,
            "validation_fraction": validation_fraction,
            "save_steps": save_steps,
            "gates": gates,
            "gate_units": split_names(gate_units),
        },
        "progressive": {
            "stages": stages,
            "min_retention": min_retention,
            "guard": guard,
            "export_stages": export_stages,
        },
        "eval": {"tasks": split_names(task), "count": count},
        "export": {"overwrite": overwrite},
    }
    if seed is not None:
        for name in ("data", "plan", "heal"):
            sections[name]["seed"] = seed
    planned = PlanSettings(**sections["plan"])
    sections["score"] = {"metrics": ("similarity", *needed_metrics(planned))}
    result = run_flow(Recipe.from_dict(sections, source="interlace progressive"), output)
    say_result(result)
