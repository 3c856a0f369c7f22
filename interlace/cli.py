"""The command line: the same words as the library, records as JSON files between the steps.

Thin on purpose: every command parses its arguments, calls the verb of the same name, and says in
one line what came of it. Errors of the package end with exit code 2 and no traceback.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from interlace._cli import (
    AttentionParts,
    Count,
    Data,
    Device,
    Dtype,
    Ffn,
    FfnParts,
    Fuse,
    Graft,
    Group,
    Heads,
    MaxBad,
    Metrics,
    Model,
    Overwrite,
    Protect,
    Remote,
    Root,
    Seed,
    Split,
    Spread,
    Weights,
    WidthMetrics,
    check_outputs,
    guarded_layers,
    judges,
    metric_weights,
    open_vlm,
    output_option,
    path_argument,
    path_option,
    read_samples,
    save_picture,
    save_record,
    say,
    say_result,
    say_table,
    shares,
    split_names,
    whole_numbers,
)
from interlace._cli_progressive import progressive
from interlace._cli_students import export, heal, prune
from interlace._launch import check_single_process
from interlace.errors import ConfigError, InterlaceError
from interlace.plan.rules import (
    DEFAULT_RULE,
    WITHOUT_MODEL,
    check_rule_without_model,
    check_use,
)
from interlace.plan.weights import SIMILARITY

app = typer.Typer(
    name="interlace",
    help=(
        "Make vision-language models smaller and faster by removing redundant layers.\n\n"
        "`progressive` does the whole job in one command, the way that keeps most. Step by step a "
        "model goes through score, plan, prune, heal, eval and export; `run` does them all from "
        "one recipe, `demo` shows them on a bundled model in a few minutes.\n\n"
        "MODEL is a checkpoint folder, a name on the Hugging Face hub, or one of the bundled "
        "models: bundled:qwen3-vl, bundled:clip, bundled:blip."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

app.command()(progressive)


@app.command()
def score(
    model: Model,
    output: Annotated[Path, output_option("Where to write the scores.")],
    data: Data = "scenes",
    root: Root = None,
    split: Split = None,
    count: Count = 512,
    max_bad_fraction: MaxBad = 0.01,
    metrics: Metrics = "similarity",
    packs: Annotated[
        str, typer.Option(help="Distances of compared hidden states, such as 1,2,3, or all.")
    ] = "1,2,3",
    tower: Annotated[
        str | None, typer.Option(help="Towers, comma separated. Default: all of them.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    heatmap: Annotated[Path | None, path_option("Also draw the similarities to this PNG.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure how redundant every layer is; by similarity in one forward pass per sample.

    Under torchrun the processes share the samples.
    """
    from interlace.config import ScoreSettings
    from interlace.data.samples import check_source
    from interlace.scores import score as run_score
    from interlace.scores.metrics import metric_classes

    check_outputs(output, heatmap, overwrite, data)
    check_source(data, root, split)
    settings = ScoreSettings(
        metrics=split_names(metrics) or (),
        packs="all" if packs.strip() == "all" else whole_numbers(packs, "--packs", "all"),
        towers=split_names(tower),
        batch_size=batch_size,
    )
    metric_classes(settings.metrics)
    if heatmap is not None and SIMILARITY not in settings.metrics:
        raise ConfigError(
            f"--heatmap draws the similarity, and --metrics is {metrics}. Score it too (--metrics "
            f"{SIMILARITY},{metrics}), or leave --heatmap out."
        )
    vlm = open_vlm(model, dtype, device, trust_remote_code)
    samples = read_samples(vlm, data, root, split, count, seed, max_bad_fraction)
    scores = run_score(vlm, samples, **vars(settings))
    save_record(scores, output)
    if heatmap is not None:
        from interlace.report.plots import similarity_map

        save_picture(similarity_map(scores), heatmap)


@app.command()
def plan(
    scores: Annotated[Path, path_argument("The file that `interlace score` wrote.")],
    output: Annotated[Path, output_option("Where to write the plan.")],
    drop_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of the layers to drop, 0..1. Default: 0.25, and none where a share of what "
            "is within layers is given (--heads, --ffn, --attention-parts, --ffn-parts)."
        ),
    ] = None,
    num_drop: Annotated[
        int | None, typer.Option(help="Number of layers to drop, instead of a share.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help=f"How layers are chosen: {', '.join(WITHOUT_MODEL)}. Default: {DEFAULT_RULE}."
        ),
    ] = None,
    protect: Protect = "auto",
    weights: Weights = None,
    tower: Annotated[
        str | None, typer.Option(help="Towers, comma separated. Default: text, or all.")
    ] = None,
    group: Group = "all",
    heads: Heads = None,
    ffn: Ffn = None,
    spread: Spread = "uniform",
    graft: Graft = None,
    attention_parts: AttentionParts = None,
    ffn_parts: FfnParts = None,
    width_metrics: WidthMetrics = None,
    seed: Seed = 42,
    picture: Annotated[Path | None, path_option("Also draw the plan to this PNG.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Choose which layers to drop, tune and freeze, and what to cut within the others.

    Needs no GPU and no model, so it judges by scores alone; `interlace progressive` tries repaired
    students, and keeps more.
    """
    from interlace.config import PlanSettings
    from interlace.plan.planner import arguments_of, make_plan
    from interlace.records import Scores

    check_outputs(output, picture, overwrite, scores)
    if rule is not None:
        check_rule_without_model(rule)
    settings = PlanSettings(
        drop_fraction=drop_fraction,
        num_drop=num_drop,
        rule=rule or DEFAULT_RULE,
        protect=guarded_layers(protect),
        seed=seed,
        weights=metric_weights(weights),
        towers=split_names(tower),
        group=group,
        heads=shares(heads, "--heads"),
        ffn=shares(ffn, "--ffn"),
        spread=spread,
        graft=graft,
        attention_parts=shares(attention_parts, "--attention-parts"),
        ffn_parts=shares(ffn_parts, "--ffn-parts"),
        width_metrics=judges(width_metrics),
    )
    check_use(settings.rule, settings.weights, group, drops=settings.drops, named=rule is not None)
    made = make_plan(Scores.load(scores), **arguments_of(settings))
    say(str(made))
    save_record(made, output)
    if picture is not None:
        from interlace.report.plots import plan_strip

        save_picture(plan_strip(made), picture)


app.command()(prune)
app.command()(heal)


@app.command(name="eval")
def evaluate(
    model: Model,
    output: Annotated[Path | None, output_option("Where to write the measurements.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Comma separated: fidelity, perplexity, vqa, caption, retrieval, speed. Default: "
            "what the model is for and the data can tell (vqa, caption or retrieval)."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The dense model; adds retention. fidelity needs it.")
    ] = None,
    data: Data = "scenes",
    root: Root = None,
    split: Split = None,
    count: Count = 256,
    max_bad_fraction: MaxBad = 0.01,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    fuse: Fuse = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a model, beside the dense one where given."""
    from interlace._fused_evaluation import evaluate_fused
    from interlace.data.samples import check_source, split_to_measure
    from interlace.evaluate import evaluate as run_evaluate
    from interlace.evaluate.selection import default_tasks

    check_outputs(output, None, overwrite, data)
    check_source(data, root, split)
    vlm = open_vlm(model, dtype, device, trust_remote_code)
    own = None
    split = split_to_measure(data, split)
    if data != "scenes":
        own = read_samples(vlm, data, root, split, count, seed, max_bad_fraction)
    tasks = default_tasks(vlm, own) if task is None else split_names(task) or ()
    held_out = None if own is None else dict.fromkeys(tasks, own)
    measured = evaluate_fused if fuse else run_evaluate
    report = measured(
        vlm,
        tasks=tasks,
        data=held_out,
        baseline=open_vlm(baseline, dtype, device, trust_remote_code) if baseline else None,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        count=count,
        seed=seed,
        split=split or "test",
    )
    say(str(report))
    if output is not None:
        save_record(report, output)


app.command()(export)


@app.command()
def run(
    recipe: Annotated[Path, path_argument("A TOML recipe.")],
    output: Annotated[Path, output_option("Folder of the run.")] = Path("interlace-run"),
) -> None:
    """Do the whole flow of a recipe; stages that are done and still fit are skipped."""
    from interlace.pipeline import run as run_flow

    result = run_flow(recipe, output)
    say_result(result)


@app.command()
def demo(
    output: Annotated[Path, output_option("Folder for the page.")] = Path("interlace-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples and steps.")] = False,
) -> None:
    """Show the main job on the bundled model: four rules, before and after healing."""
    from interlace.demo import run_demo

    page = run_demo(output, quick=quick)
    say(f"Open {page} in a browser.")


@app.command()
def ops() -> None:
    """List every op and backend, and why a backend cannot run here."""
    from interlace.ops import table

    rows = [[op, backend, reason or "runs"] for op, backend, reason in table()]
    say_table(["op", "backend", "on this machine"], rows)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Time the ops, every backend beside what PyTorch offers. Options: `interlace bench --help`."""
    # its source is beside the package's, where type checkers do not find it
    run = importlib.import_module("interlace.microbenchmarks.run")
    raise typer.Exit(run.main(context.args))


@app.command()
def doctor() -> None:
    """Show versions, GPUs, the compiled extension and what is missing."""
    from interlace.ops import doctor as examine

    say_table(["what", "on this machine"], [[key, value] for key, value in examine().items()])


@app.callback()
def _alone(context: typer.Context) -> None:
    if context.invoked_subcommand not in ("score", "heal"):
        check_single_process(f"interlace {context.invoked_subcommand}")


def main() -> None:
    """Run the command line; errors of the package end with exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # the libraries below are chatty at this level about things nobody asked for
    for name in ("httpx", "accelerate", "datasets", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        # those of transformers, which fill logs with their every state; read when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # as on Ctrl-C, what is half written goes; exit codes are those of a shell
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except InterlaceError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            typer.echo("Stopped before it was done; what was half written is removed.", err=True)
        raise
    finally:
        # torch ends noisily where it is left to it; a command that needed no torch loads none here
        if "torch" in sys.modules:
            from interlace._torch_utils import leave_processes

            leave_processes()
