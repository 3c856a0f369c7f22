"""Settings of every stage, and recipes: all of them in one TOML file.

A recipe has one section per stage, named like it, with the fields of the classes below as keys:

    [model]
    path = "Qwen/Qwen3-VL-8B-Instruct"
    [plan]
    drop_fraction = 0.25

Whatever is left out keeps its default. Unknown sections and keys are refused.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from interlace._coerce import build, field_types, within
from interlace._heal_settings import HealSettings
from interlace._settings import Settings
from interlace.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = [
    "DEFAULT_DROP_FRACTION",
    "DataSettings",
    "EvalSettings",
    "ExportSettings",
    "HealSettings",
    "ModelSettings",
    "PlanSettings",
    "ProgressiveSettings",
    "PruneSettings",
    "Recipe",
    "ScoreSettings",
]

DEFAULT_DROP_FRACTION = 0.25
DEFAULT_RANK = 16


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which model to open.

    Attributes:
        path: folder of the checkpoint or its name on the Hugging Face hub.
        dtype: "float32", "bfloat16" or "float16"; default: as stored.
        device: such as "cuda" or "cpu"; default: the GPU where there is one.
        trust_remote_code: run code that the checkpoint brings along.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def _check(self) -> None:
        if not self.path.strip():
            raise ConfigError("ModelSettings.path is empty. Give a folder or a model name.")


@dataclass(frozen=True)
class DataSettings(Settings):
    """Which samples to score and heal with.

    Attributes:
        source: "scenes", a .json or .jsonl file, a folder, or the name of a data set.
        root: folder that relative image paths start from; images outside are refused.
        split: part of the data to score and heal with, where it has several; default: "train".
        tasks: only samples of these tasks; default: all, of the built-in scenes those that the
            model can learn from.
        calibration_count: samples to score with, and to fit bridges on.
        heal_count: samples to heal with; default: all, or 4096 of the unlimited "scenes".
        seed: seed of the choice of samples.
        max_bad_fraction: share of samples that cannot be used to skip before it is an error.
    """

    source: str = "scenes"
    root: str | None = None
    split: str | None = None
    tasks: tuple[Literal["chat", "vqa", "caption", "retrieval"], ...] | None = None
    calibration_count: int = within(512, 1)
    heal_count: int | None = within(None, 1)
    seed: int = within(0, 0)
    max_bad_fraction: float = within(0.01, 0.0, 1.0)


@dataclass(frozen=True)
class ScoreSettings(Settings):
    """How to score.

    Attributes:
        metrics: names of the metrics.
        packs: distances p of the compared states h_i and h_{i+p}, or "all" of them.
        towers: towers to score; default: all.
        batch_size: samples per forward pass.
        answers: also feed the answers, not the questions alone.
        packed: pack batches of unequal length instead of padding them.
        num_directions: random directions per layer of the metric "sensitivity_zeroth_order".
    """

    metrics: tuple[str, ...] = ("similarity",)
    packs: Literal["all"] | tuple[int, ...] = (1, 2, 3)
    towers: tuple[str, ...] | None = None
    batch_size: int = within(8, 1)
    answers: bool = False
    packed: bool = False
    num_directions: int = within(8, 1)

    def _check(self) -> None:
        if not self.metrics:
            raise ConfigError("ScoreSettings.metrics is empty. Name at least one metric.")
        if self.packs != "all" and (not self.packs or min(self.packs) < 1):
            raise ConfigError(
                f"ScoreSettings.packs must be 'all' or distances of at least 1, got {self.packs}."
            )


@dataclass(frozen=True)
class PlanSettings(Settings):
    """What to drop.

    Attributes:
        drop_fraction: share of the layers to drop, 0..1, or one per tower. Default: 0.25, unless
            another amount is given.
        num_drop: number of layers to drop, or one per tower, instead of a fraction.
        parameters: share of the parameters of the layers to take out, or one per tower, as layers,
            heads and neurons together (`interlace.split_plan`), instead of both; for the rule
            "compensated".
        fixed_time: share of a layer's time that passes whatever its width, 0 to below 1, or one per
            tower; above 0, `parameters` stands for the time of whole layers of that share.
        rule: name of the rule that chooses the layers.
        protect: layers never to drop, or a table of them per tower, or "auto": those that the
            scores recorded as pinned, or "alignment": these and the layers that carry the alignment
            of image and text. An empty list gives the published rules unguarded.
        seed: seed of the rules that draw.
        weights: metric -> weight of at least 0, to judge layers by a mix of metrics.
        towers: towers to plan; default: the text tower where there is one, else all.
        group: token group of the similarity: "all", "text", "vision" or "balanced".
        heads: share of the query heads of the kept layers to cut, or one per tower.
        ffn: share of the neurons of the kept layers to cut, or one per tower.
        spread: "uniform" (the same in every layer, a standard checkpoint), "global" (by importance
            over all layers) or "ragged" (single query heads).
        width_metrics: "heads" or "ffn" -> the metric they are judged by.
        graft: share of the KV groups of dropped layers that move into the tuned neighbour.
        attention_parts: share of the kept layers that lose their self-attention whole, or one per
            tower.
        ffn_parts: the same for the feed-forward part.
        standard: refuse what plain transformers could not load; default: with "uniform", no
            grafting and no parts taken out.
    """

    drop_fraction: float | dict[str, float] | None = None
    num_drop: int | dict[str, int] | None = None
    parameters: float | dict[str, float] | None = None
    fixed_time: float | dict[str, float] = 0.0
    rule: str = "interlace"
    protect: (
        Literal["auto", "alignment"]
        | tuple[int, ...]
        | dict[str, Literal["auto", "alignment"] | tuple[int, ...]]
    ) = "auto"
    seed: int = within(42, 0)
    weights: dict[str, float] | None = None
    towers: tuple[str, ...] | None = None
    group: str = "all"
    heads: float | dict[str, float] | None = None
    ffn: float | dict[str, float] | None = None
    spread: Literal["uniform", "global", "ragged"] = "uniform"
    width_metrics: dict[str, str] | None = None
    graft: float | None = within(None, 0.0, 1.0, above=True)
    attention_parts: float | dict[str, float] | None = None
    ffn_parts: float | dict[str, float] | None = None
    standard: bool | None = None

    @property
    def drops(self) -> bool:
        """Whether a number of layers is asked to go."""
        return self.drop_fraction is not None or self.num_drop is not None

    def _check(self) -> None:
        if self.drop_fraction is not None and self.num_drop is not None:
            raise ConfigError("Give either drop_fraction or num_drop in PlanSettings, not both.")
        if self.fixed_time and self.parameters is None:
            raise ConfigError(
                "PlanSettings.fixed_time says how a share of the parameters is counted, and there "
                "is none. Give parameters, or leave fixed_time out."
            )
        shares = (self.heads, self.ffn, self.attention_parts, self.ffn_parts)
        asked = (self.drop_fraction, self.num_drop, self.parameters, *shares)
        if all(each is None for each in asked):
            object.__setattr__(self, "drop_fraction", DEFAULT_DROP_FRACTION)
        fractions, counts = self.drop_fraction, self.num_drop
        for value in fractions.values() if isinstance(fractions, dict) else [fractions]:
            if value is not None and not 0.0 < value < 1.0:
                raise ConfigError(
                    f"PlanSettings.drop_fraction must be above 0 and below 1, got {value!r}. "
                    "0.25 drops a quarter of the layers."
                )
        for count in counts.values() if isinstance(counts, dict) else [counts]:
            if count is not None and count < 1:
                raise ConfigError(f"PlanSettings.num_drop must be at least 1, got {count}.")


@dataclass(frozen=True)
class PruneSettings(Settings):
    """How to cut.

    Attributes:
        allow_pinned: also drop layers that the model's family pins, where surgery can.
        bridges: what stands in for the removed layers: "none", "scale", "fold", "refit",
            "diagonal" or "lowrank", or a table of them per tower. They are fitted on the
            calibration samples.
        rank: of low-rank bridges.
        token_weights: by what the tokens count in the fits: "even", or "fisher", by how much the
            predictions of the dense model hang on them, which takes gradients.
    """

    allow_pinned: bool = False
    bridges: str | dict[str, str] = "none"
    rank: int = within(DEFAULT_RANK, 1)
    token_weights: Literal["even", "fisher"] = "even"

    def _check(self) -> None:
        names = self.bridges.values() if isinstance(self.bridges, dict) else [self.bridges]
        if self.rank != DEFAULT_RANK and "lowrank" not in names:
            raise ConfigError(
                f"PruneSettings: rank is {self.rank}, but bridges is {self.bridges!r}, and only "
                "'lowrank' has a rank. Name that bridge, or leave rank out."
            )
        if self.token_weights != "even" and all(name == "none" for name in names):
            raise ConfigError(
                f"PruneSettings: token_weights is {self.token_weights!r}, but bridges is "
                f"{self.bridges!r}, so nothing is fitted. Name a bridge, or set token_weights to "
                "'even'."
            )


@dataclass(frozen=True)
class ProgressiveSettings(Settings):
    """How to drop layers in several stages, each with scoring and healing of its own.

    Attributes:
        stages: number of stages; one that would drop no further layer is merged into the next. One
            cut at once kept the most on the same tokens (docs/retention.md); more yield smaller
            students as well, and let the guard stop in between.
        guard: what is measured after every stage, beside the dense model: "loss" (retention is the
            likelihood of the right answers, exp(dense loss - loss)), or "task/metric" such as
            "vqa/accuracy".
        min_retention: a stage that retains less of `guard`, 0..1, is rolled back and ends the run.
            Default: stages are measured, but none is rolled back.
        gate_importance: weight of the gates learned in a stage, beside 1 for the similarity, in the
            choice of the next; default: 1 for rules that choose by scores, where there are gates.
        export_stages: also export the student of every stage (`interlace run` only).
    """

    stages: int = within(1, 1)
    guard: str = "loss"
    min_retention: float | None = within(None, 0.0, 1.0)
    gate_importance: float | None = within(None, 0.0)
    export_stages: bool = False


@dataclass(frozen=True)
class EvalSettings(Settings):
    """What to measure.

    Attributes:
        tasks: names of the evaluations.
        count: samples per task.
        source: other data to measure on; default: the source of [data].
        root: folder that its relative image paths start from.
        split: part of the data to measure on, where it has several; default: "test".
        batch_size: samples per forward pass.
        max_new_tokens: longest answer.
        seed: seed of the choice of samples.
        fuse: measure the student on fused kernels (`interlace.fuse`), beside the dense model as it
            is. What is exported is not fused.
    """

    tasks: tuple[str, ...] = ("fidelity",)
    count: int = within(256, 1)
    source: str | None = None
    root: str | None = None
    split: str | None = None
    batch_size: int = within(16, 1)
    max_new_tokens: int = within(64, 1)
    seed: int = within(0, 0)
    fuse: bool = False

    def _check(self) -> None:
        if not self.tasks:
            raise ConfigError("EvalSettings.tasks is empty. Name at least one task.")
        if self.root is not None and self.source is None:
            raise ConfigError("EvalSettings.root belongs to a source of its own. Give both.")


@dataclass(frozen=True)
class ExportSettings(Settings):
    """How to write the result.

    Attributes:
        overwrite: replace an existing folder that is not from an earlier run of the recipe.
        verify: reload the checkpoint in a fresh process and compare.
    """

    overwrite: bool = False
    verify: bool = True


@dataclass(frozen=True)
class Recipe(Settings):
    """The settings of the whole flow, one section per stage; without [progressive] in one cut."""

    model: ModelSettings
    data: DataSettings = field(default_factory=DataSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    prune: PruneSettings = field(default_factory=PruneSettings)
    heal: HealSettings = field(default_factory=HealSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    progressive: ProgressiveSettings | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
        """Make a recipe from nested mappings, as read from TOML.

        Raises:
            ConfigError: an unknown section or key (the nearest valid name is given), a missing
                model, or a value of the wrong type or out of range.
        """
        for name in values:
            if name not in field_types(cls):
                message = unknown_name("recipe section", name, field_types(cls))
                raise ConfigError(f"{source}: {message}")
        made: dict[str, Any] = {}
        for name, kind in field_types(cls).items():
            # the one section that may be absent; JSON says so by null
            if name not in values or (name == "progressive" and values[name] is None):
                continue
            section = ProgressiveSettings if name == "progressive" else kind
            made[name] = build(section, values[name], f"{source}, [{name}]", "recipe key")
        if "model" not in made:
            raise ConfigError(f"{source}: no model. Add a section [model] with path = '...'.")
        return cls(**made)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a TOML file; see `from_dict` for the errors."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise ConfigError(f"There is no recipe at {path}. Check the path.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read the recipe {path} ({error}).") from error
        except ValueError as error:
            # also a number of thousands of digits, which Python does not read
            raise ConfigError(f"The recipe {path} is not valid TOML: {error}.") from error
        return cls.from_dict(values, source=str(path))
