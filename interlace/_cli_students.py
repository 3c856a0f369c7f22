"""The commands that write a model: prune, heal and export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interlace._cli import (
    AllowPinned,
    Bridges,
    Count,
    Data,
    Device,
    Dtype,
    HiddenWeight,
    MaxBad,
    Model,
    Overwrite,
    Rank,
    Remote,
    Root,
    Seed,
    Split,
    TokenWeights,
    open_vlm,
    output_option,
    path_argument,
    path_option,
    prune_settings,
    read_samples,
    say,
)
from interlace._files import check_new_checkpoint, check_new_folder
from interlace._launch import is_first_process
from interlace.config import DEFAULT_RANK, HealSettings
from interlace.errors import CheckpointError, ConfigError
from interlace.surgery.bridges.names import BRIDGE_SAMPLES, has_bridges

if TYPE_CHECKING:
    from collections.abc import Sequence


# what says which samples are read
_OF_DATA = ("data", "root", "split", "count", "max_bad_fraction", "seed")


def prune(
    context: typer.Context,
    model: Model,
    plan_file: Annotated[Path, path_argument("What `interlace plan` wrote.", "PLAN")],
    output: Annotated[Path, output_option("Folder of the new checkpoint.")],
    allow_pinned: AllowPinned = False,
    bridges: Bridges = "none",
    rank: Rank = DEFAULT_RANK,
    token_weights: TokenWeights = "even",
    data: Data = "scenes",
    root: Root = None,
    split: Split = None,
    count: Count = BRIDGE_SAMPLES,
    max_bad_fraction: MaxBad = 0.01,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    overwrite: Overwrite = False,
) -> None:
    """Remove the planned layers and save the student, not yet healed.

    Bridges are fitted on the data; without them no data is read.
    """
    from interlace.data.samples import check_source
    from interlace.export import export as run_export
    from interlace.records import Plan
    from interlace.surgery import prune as run_prune

    check_new_checkpoint(output, overwrite=overwrite, inputs=(model, data, root))
    cut = prune_settings(allow_pinned, bridges, rank, token_weights)
    unread = [] if has_bridges(cut.bridges) else _options_given(context, _OF_DATA)
    if unread:
        named = ", ".join(unread)
        raise ConfigError(
            f"{named} given, but data is read only to fit bridges, and --bridges is {bridges!r}. "
            f"Name a bridge, such as 'refit', or leave {named} out."
        )
    check_source(data, root, split)
    chosen = Plan.load(plan_file)
    dense = open_vlm(model, dtype, device, trust_remote_code)
    calibration = None
    if has_bridges(cut.bridges):
        calibration = read_samples(dense, data, root, split, count, seed, max_bad_fraction)
    student = run_prune(dense, chosen, data=calibration, **vars(cut))
    run_export(student, output, records=(chosen,), overwrite=overwrite)
    say(f"Wrote {output} ({student.num_parameters():,} parameters)")


def _options_given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Return the options of these parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        f"--{name.replace('_', '-')}"
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]


def heal(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The DENSE model: folder, hub name, bundled:NAME.")],
    plan_file: Annotated[Path, path_argument("What `interlace plan` wrote.", "PLAN")],
    output: Annotated[Path, output_option("Folder of the healed model.")],
    data: Data = "scenes",
    root: Root = None,
    split: Split = None,
    count: Count = 4096,
    max_bad_fraction: MaxBad = 0.01,
    allow_pinned: AllowPinned = False,
    bridges: Bridges = "none",
    rank: Rank = DEFAULT_RANK,
    token_weights: TokenWeights = "even",
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps, instead of epochs.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 16,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes per step.")] = 1,
    validation_fraction: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=0.5,
            help="Share of the samples that is not trained on and says how far healing goes.",
        ),
    ] = 0.0,
    distil: Annotated[
        bool,
        typer.Option(help="Also learn from the dense model; off is the published recipe."),
    ] = True,
    hidden_weight: HiddenWeight = 1.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    save_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run stopped.")] = False,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    overwrite: Overwrite = False,
) -> None:
    """Cut the dense model by the plan, train the tuned layers, and save the result.

    Checkpoints go to OUTPUT.healing beside the result; `--resume` goes on from the newest, or
    starts where there is none, and `--overwrite` without it starts anew. Bridges are fitted on the
    first 512 samples of the data. Under torchrun the processes train together, each on batches of
    its own.
    """
    from interlace.data.samples import check_source
    from interlace.export import export as run_export
    from interlace.heal import heal as run_heal
    from interlace.records import Plan
    from interlace.surgery import prune as run_prune

    check_new_checkpoint(output, overwrite=overwrite, inputs=(model, data, root))
    if not distil and _options_given(context, ("hidden_weight",)):
        raise ConfigError(
            f"--hidden-weight {hidden_weight:g} learns from the dense model, and --no-distil asks "
            "not to. Leave one of them out."
        )
    checkpoints = output.with_name(output.name + ".healing")
    # of several processes the first one makes and removes the folder, so no other can judge it
    replaced = checkpoints.exists() and not resume and is_first_process()
    if replaced:
        _check_replaced(checkpoints, overwrite)
    cut = prune_settings(allow_pinned, bridges, rank, token_weights)
    check_source(data, root, split)
    chosen = Plan.load(plan_file)
    settings = HealSettings(
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        validation_fraction=validation_fraction,
        hidden_weight=hidden_weight if distil else 0.0,
        kl_weight=1.0 if distil else 0.0,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        seed=seed,
    )
    teacher = open_vlm(model, dtype, device, trust_remote_code)
    healing = read_samples(teacher, data, root, split, count, seed, max_bad_fraction)
    calibration = healing.subset(BRIDGE_SAMPLES) if has_bridges(cut.bridges) else None
    student = run_prune(teacher, chosen, data=calibration, **vars(cut))
    if replaced:
        _remove(checkpoints)
    report = run_heal(
        student,
        teacher=teacher if distil else None,
        data=healing,
        settings=settings,
        output=checkpoints,
        resume=resume,
    )
    if is_first_process():
        run_export(student, output, records=(chosen, report), overwrite=overwrite)
    kept = f", {report.share:.0%} of the way kept" if report.validation else ""
    steps = f"{report.steps} step{'s' * (report.steps != 1)}"
    # they repeat where the steps take more than there are
    seen = f"{report.num_samples} samples drawn from {len(healing)}"
    say(f"Wrote {output} after {steps} on {seen}{kept}")


def _check_replaced(folder: Path, overwrite: bool) -> None:
    """Refuse a folder of checkpoints that is not to be replaced, or that holds anything else.

    Raises:
        ConfigError: says which, and what to do.
    """
    from interlace.heal.checkpoints import foreign

    if not overwrite:
        raise ConfigError(
            f"The folder {folder} of the checkpoints exists already. Go on with its run (--resume),"
            " start anew in its place (--overwrite), or choose another output."
        )
    check_new_folder(folder, overwrite=True)
    others = foreign(folder)
    if others:
        raise ConfigError(
            f"Refusing to remove {folder}: beside checkpoints of healing it holds {others[0]}. "
            "Move that elsewhere, or choose another output."
        )


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise CheckpointError(
            f"Cannot remove {folder} ({error.strerror or error}). Remove it, or choose another "
            "output."
        ) from error


def export(
    model: Model,
    output: Annotated[Path, path_argument("Folder to write.")],
    record: Annotated[
        list[Path] | None,
        path_option("A record to put beside the weights and into the model card; repeat."),
    ] = None,
    dtype: Dtype = None,
    trust_remote_code: Remote = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a checked transformers checkpoint with its records and a model card.

    The records that lie in the folder of a student come along.
    """
    from interlace.export import export as run_export
    from interlace.records import load_record, records_in

    check_new_checkpoint(output, overwrite=overwrite, inputs=(model,))
    vlm = open_vlm(model, dtype, "cpu", trust_remote_code)
    records = [load_record(path) for path in record or ()]
    if vlm.record is not None:
        known = {each.fingerprint for each in records}
        records += [each for each in records_in(Path(model)) if each.fingerprint not in known]
    say(f"Wrote {run_export(vlm, output, records=records, overwrite=overwrite)}")
