"""What the commands share: options of the same name and meaning, and small helpers."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from interlace._files import check_new_file, home_path
from interlace._launch import is_first_process
from interlace.config import PruneSettings
from interlace.errors import ConfigError
from interlace.surgery.bridges.names import BRIDGES, TOKEN_WEIGHTS, check_bridges

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from interlace.data.samples import Samples
    from interlace.models import VLM
    from interlace.pipeline import RunResult
    from interlace.records import Record

Model = Annotated[str, typer.Argument(help="Folder, hub name, or bundled:NAME.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")
]
Device = Annotated[str | None, typer.Option(help="Such as cuda or cpu. Default: cuda if present.")]
Remote = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")
]
Data = Annotated[
    str,
    typer.Option(
        help="scenes (built in), a conversation .json/.jsonl, a folder of images with captions, "
        "or the name of a Hugging Face data set."
    ),
]
Root = Annotated[
    str | None, typer.Option(help="Folder that image paths start from. Default: the file's own.")
]
Split = Annotated[
    str | None,
    typer.Option(help="Split of a data set or the scenes. Default: train (test to measure on)."),
]
MaxBad = Annotated[
    float, typer.Option(help="Share of samples that cannot be used to skip before it is an error.")
]
Count = Annotated[int, typer.Option(min=1, help="Number of samples.")]
HiddenWeight = Annotated[
    float, typer.Option(min=0.0, help="Weight of the hidden states' distillation in healing.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Metrics = Annotated[
    str,
    typer.Option(
        "--metrics",
        "--metric",
        help="Comma separated: similarity, alignment (1 forward pass per sample for both), "
        "sensitivity (3), relevance, attention_relevance, mlp_relevance (half as many as there are "
        "layers, each), sensitivity_zeroth_order (16 times as many as relevance); of single heads "
        "and neurons, for `plan --heads` and `--ffn`: head_norm, ffn_norm (1 each), head_taylor "
        "(3), head_obs, ffn_obs (10 for both).",
    ),
]
Protect = Annotated[
    str,
    typer.Option(
        help="auto (layers that the model's family needs), alignment (these and the layers that "
        "carry the alignment of image and text), none (the published rule as it is), or layer "
        "numbers such as 0,1,2."
    ),
]
Group = Annotated[str, typer.Option(help="Token group: all, text, vision or balanced.")]
Weights = Annotated[
    str | None,
    typer.Option(help="Judge layers by several metrics, such as similarity=1,relevance=2."),
]
Heads = Annotated[
    str | None,
    typer.Option(
        help="Share of the query heads of the kept layers to cut, 0..1, or per tower, such as "
        "text=0.25,vision=0.1. Needs the metric head_norm, head_taylor or head_obs."
    ),
]
Ffn = Annotated[
    str | None,
    typer.Option(
        help="The same for neurons of feed-forward parts. Needs the metric ffn_norm or ffn_obs."
    ),
]
Spread = Annotated[
    Literal["uniform", "global", "ragged"],
    typer.Option(
        help="How --heads and --ffn are spread: uniform (the same in every layer, a standard "
        "checkpoint), global (by importance over all layers) or ragged (single query heads)."
    ),
]
Graft = Annotated[
    float | None,
    typer.Option(
        help="Share of the KV groups of dropped layers, 0..1, that move into the tuned neighbour. "
        "Needs the metric head_norm, head_taylor or head_obs."
    ),
]
AttentionParts = Annotated[
    str | None,
    typer.Option(
        help="Share of the kept layers, 0..1, or per tower, that lose their self-attention whole. "
        "Needs the metric attention_relevance."
    ),
]
FfnParts = Annotated[
    str | None,
    typer.Option(help="The same for feed-forward parts. Needs the metric mlp_relevance."),
]
WidthMetrics = Annotated[
    str | None,
    typer.Option(help="What heads and neurons are judged by, such as heads=head_obs,ffn=ffn_obs."),
]
Fuse = Annotated[
    bool,
    typer.Option("--fuse", help="Measure MODEL on fused kernels, and the baseline as it is."),
]
Bridges = Annotated[
    str,
    typer.Option(
        help=f"What stands in for the removed layers: {', '.join(BRIDGES)}; or per tower, such as "
        "text=fold,vision=none."
    ),
]
WEIGHED = (
    f"What counts in the fits of bridges: {' or '.join(TOKEN_WEIGHTS)} (by how much the "
    "predictions hang on a token; takes gradients)."
)
Rank = Annotated[int, typer.Option(min=1, help="Rank of lowrank bridges.")]
TokenWeights = Annotated[str, typer.Option(help=WEIGHED)]
AllowPinned = Annotated[
    bool, typer.Option("--allow-pinned", help="Also drop layers that the family pins.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


def say(text: str) -> None:
    """Write a line to standard output; of several processes the first one does."""
    if is_first_process():
        typer.echo(text)


def say_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table to standard output, no wider than the terminal."""
    from interlace._records.tables import plain_table

    # 80 columns where there is no terminal
    say(plain_table(head, rows, width=shutil.get_terminal_size((80, 24)).columns))


def say_result(result: RunResult) -> None:
    """Write what a run made: plan, measurements, stages, what was skipped, and where it is."""
    say(str(result.plan))
    say(str(result.result))
    if result.progressive is not None:
        for stage in result.progressive.stages:
            end = "" if stage.kept else ", rolled back"
            say(f"Stage {stage.number}: {stage.gone_text}, retention {stage.retention:.4f}{end}")
        if result.progressive.stopped:
            say(result.progressive.stopped)
    if result.skipped:
        say(f"Taken from the earlier run: {', '.join(result.skipped)}")
    say(f"The finished model is in {result.folder}")


def split_names(text: str | None) -> tuple[str, ...] | None:
    """Split a comma separated option; None stays None."""
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(text: str, option: str, words: str) -> tuple[int, ...]:
    """Read a comma separated option of whole numbers; `words` are what else it accepts.

    Raises:
        ConfigError: a part is no whole number, or there is none.
    """
    try:
        found = tuple(int(part) for part in split_names(text) or ())
    except ValueError:
        found = ()
    if not found:
        raise ConfigError(f"{option} is {text!r}; give {words}, or whole numbers such as 1,2,3.")
    return found


def guarded_layers(text: str) -> Any:
    """Read the option --protect.

    Raises:
        ConfigError: it is neither a known word nor layer numbers.
    """
    word = text.strip()
    if word == "none":
        return ()
    if word in ("auto", "alignment"):
        return word
    return whole_numbers(word, "--protect", "auto, alignment, none")


def pairs(
    text: str | None,
    option: str,
    advice: str,
    kind: Callable[[str], Any] = str,
    *,
    alone: bool = False,
) -> Any:
    """Read an option of comma separated NAME=VALUE; None stays None.

    Args:
        text: what was given.
        option: its name, for the message.
        advice: what to give, for the message.
        kind: makes a value out of its text, or raises ValueError.
        alone: take a single value without a name as well.

    Returns:
        Name -> value, or the single value.

    Raises:
        ConfigError: a part has no name or no usable value, or a name stands twice.
    """
    if text is None:
        return None
    found: dict[str, Any] = {}
    try:
        if alone and "=" not in text:
            return kind(text.strip())
        for part in split_names(text) or ():
            name, _, value = (each.strip() for each in part.partition("="))
            if not name or not value or name in found:
                raise ValueError(part)
            found[name] = kind(value)
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}; give {advice}.") from error
    return found


def metric_weights(text: str | None) -> dict[str, float] | None:
    """Read the option --weights; see `pairs`."""
    advice = "every metric once with a number, such as similarity=1,relevance=2"
    found: dict[str, float] | None = pairs(text, "--weights", advice, float)
    return found


def shares(text: str | None, option: str) -> float | dict[str, float] | None:
    """Read an option that is a share, or one per tower; see `pairs`."""
    advice = "a share such as 0.25, or every tower once with one, such as text=0.25,vision=0.1"
    found: float | dict[str, float] | None = pairs(text, option, advice, float, alone=True)
    return found


def judges(text: str | None) -> dict[str, str] | None:
    """Read the option --width-metrics; see `pairs`."""
    advice = "heads or ffn once with a metric, such as heads=head_taylor,ffn=random"
    found: dict[str, str] | None = pairs(text, "--width-metrics", advice)
    return found


def read_bridges(text: str) -> str | dict[str, str]:
    """Read the option that names bridges, for all towers or per tower.

    Raises:
        ConfigError: an unknown bridge, a part without a tower, or a tower that stands twice.
    """
    advice = "one bridge, or every tower once with one, such as text=fold,vision=none"
    found: str | dict[str, str] = pairs(text, "--bridges", advice, alone=True)
    check_bridges(found)
    return found


def prune_settings(
    allow_pinned: bool, bridges: str, rank: int, token_weights: Any
) -> PruneSettings:
    """Read the options that say how to cut. Raises ConfigError."""
    return PruneSettings(
        allow_pinned=allow_pinned,
        bridges=read_bridges(bridges),
        rank=rank,
        token_weights=token_weights,
    )


def path_option(text: str, *names: str) -> Any:
    """An option that is a path."""
    return typer.Option(*names, parser=home_path, help=text)


def path_argument(text: str, metavar: str | None = None) -> Any:
    """An argument that is a path."""
    return typer.Argument(parser=home_path, metavar=metavar, help=text)


def output_option(text: str) -> Any:
    """The option that says where a command writes its result."""
    return path_option(text, "--output", "-o")


def check_outputs(
    output: Path | None, picture: Path | None, overwrite: bool, *inputs: str | Path
) -> None:
    """Refuse outputs of a command that cannot be written, before any work is spent on them.

    Raises:
        ConfigError: one exists, is an input, is a folder, is a picture of an unknown kind, or both
            are one file.
        CheckpointError: the place cannot be written to.
    """
    for path in (output, picture):
        if path is not None:
            check_new_file(path, overwrite=overwrite, inputs=inputs)
    if picture is not None:
        from interlace.report.plots import figure_format

        figure_format(picture)
        if output is not None and picture.absolute() == output.absolute():
            raise ConfigError(f"{picture} is named for the record and for the picture. Name two.")


def open_vlm(model: str, dtype: str | None, device: str | None, remote: bool) -> VLM:
    """Open a model as the options say."""
    from interlace._torch_utils import default_device
    from interlace.models import open_model

    return open_model(
        model, dtype=dtype, device=device or default_device(), trust_remote_code=remote
    )


def read_samples(
    vlm: VLM, data: str, root: str | None, split: str | None, count: int, seed: int, max_bad: float
) -> Samples:
    """Read samples for a model as the options say."""
    from interlace.data.samples import samples, scenes_tasks

    return samples(
        data,
        tasks=scenes_tasks(vlm.family.objective) if data == "scenes" else None,
        root=root,
        split=split,
        count=count,
        seed=seed,
        processor=vlm.processor,
        max_bad_fraction=max_bad,
    )


def save_record(record: Record, path: Path) -> None:
    """Save a record and say where; of several processes the first one does."""
    if is_first_process():
        record.save(path)
        say(f"Wrote {path}")


def save_picture(figure: Figure, path: Path) -> None:
    """Save a figure and say where; of several processes the first one does."""
    from interlace.report.plots import save_figure

    if is_first_process():
        save_figure(figure, path)
        say(f"Wrote {path}")
