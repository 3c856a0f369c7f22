"""Scores: what a model's layers measured on calibration data.

L = number of layers of a tower; h_0 is the input of layer 0, h_i the input of layer i and h_L the
output of the last layer, before any final norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from interlace._coerce import Checked
from interlace._records.base import Record
from interlace._records.gates import add_gates
from interlace._records.merging import merged_tower
from interlace._records.scores_text import scores_text
from interlace._records.shape import ModelShape  # noqa: TC001 (read at run time by Checked)
from interlace.errors import ConfigError, DataError, PlanError, ShapeError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from interlace._records.healing import HealReport

# Cosines that were computed in bfloat16, as the published code does, may leave [-1, 1] by one
# rounding step.
_COSINE_SLACK = 2**-7

# The token group whose tables give image and text tokens equal mass, made from those two groups.
BALANCED = "balanced"
_MODALITIES = ("text", "vision")
# One layer in so many counts as carrying the alignment by what was measured of it.
_LAYERS_PER_ALIGNED = 8


@dataclass(frozen=True)
class TowerScores(Checked):
    """The scores of one tower.

    Attributes:
        num_layers: L.
        similarity: group -> pack p -> mean cosines of h_i and h_{i+p} for i = 0..L-p-1. The pair
            that ends in h_L is not among them, as in the published code.
        tail: group -> pack p -> mean cosine of h_{L-p} and h_L; may be empty.
        metrics: other metrics by name, one value per layer; all measure importance, so that a high
            value speaks for keeping the layer.
        importance: metric of heads or neurons -> place in the layer, such as "self_attn" -> layer
            -> one value per query head or neuron; empty where a layer lacks the place.
        pinned: layers that the model's family must keep, with the reason.
        cross_attention_layers: the layers with cross-attention, where only some have it.
        num_samples: number of calibration samples behind the means.
        num_tokens: number of tokens per group.
        group_samples: number of samples that have tokens of a group, or that stand behind a metric;
            `num_samples` where absent.
        alignment: layers at which image and text meet (DeepStack, projector inputs), with the
            reason; None where the metric "alignment" was not scored.
        notes: what a reader of the values should know.
    """

    num_layers: int
    similarity: dict[str, dict[int, tuple[float, ...]]] = field(default_factory=dict)
    tail: dict[str, dict[int, float]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    importance: dict[str, dict[str, tuple[tuple[float, ...], ...]]] = field(default_factory=dict)
    pinned: dict[int, str] = field(default_factory=dict)
    cross_attention_layers: tuple[int, ...] | None = None
    num_samples: int = 0
    num_tokens: dict[str, int] = field(default_factory=dict)
    group_samples: dict[str, int] = field(default_factory=dict)
    alignment: dict[int, str] | None = None
    notes: tuple[str, ...] = ()

    def _check(self) -> None:
        if self.num_layers < 1:
            raise ShapeError(f"A tower has at least 1 layer, got num_layers={self.num_layers}.")
        for group, packs in self.similarity.items():
            for pack, values in packs.items():
                self._check_pack(group, pack, values)
        for group, ends in self.tail.items():
            for pack, value in ends.items():
                self._check_pack(group, pack, (value,), expected=1)
        for name, values in self.metrics.items():
            if len(values) != self.num_layers:
                raise ShapeError(
                    f"The metric '{name}' has {len(values)} values for {self.num_layers} layers."
                )
        for metric, sites in self.importance.items():
            for site, layers in sites.items():
                if len(layers) != self.num_layers:
                    raise ShapeError(
                        f"The metric '{metric}' of '{site}' has values for {len(layers)} of "
                        f"{self.num_layers} layers."
                    )
        named = [*self.pinned, *(self.cross_attention_layers or ()), *(self.alignment or ())]
        outside = sorted({layer for layer in named if not 0 <= layer < self.num_layers})
        if outside:
            raise ShapeError(f"The tower has layers 0..{self.num_layers - 1}, not {outside}.")

    def _check_pack(
        self, group: str, pack: int, values: tuple[float, ...], expected: int | None = None
    ) -> None:
        if not 1 <= pack <= self.num_layers:
            raise ShapeError(f"Packs of {self.num_layers} layers are 1..L, got {pack}.")
        wanted = self.num_layers - pack if expected is None else expected
        if len(values) != wanted:
            raise ShapeError(
                f"Pack {pack} of {self.num_layers} layers has {wanted} values (L - p, the pair "
                f"that ends in h_L is not scored), got {len(values)} for group '{group}'."
            )
        for layer, value in enumerate(values):
            if not math.isfinite(value):
                raise DataError(
                    f"The similarity of group '{group}', pack {pack}, layer {layer} is {value}. "
                    "The activations were not finite; score again in a wider dtype."
                )
            if abs(value) > 1 + _COSINE_SLACK:
                raise DataError(
                    f"The similarity of group '{group}', pack {pack}, layer {layer} is {value}, "
                    "outside -1..1: it is no cosine."
                )

    def packs(self, pack: int, group: str = "all") -> tuple[float, ...]:
        """Return the cosines of h_i and h_{i+pack}, i = 0..L-pack-1.

        The group "balanced" is the mean of the groups "text" and "vision": both modalities count
        alike, however many tokens an image has. Where a tower reads one of them, it is that one.

        Raises:
            PlanError: the similarity, the group or the pack was not scored.
        """
        tables = self._balanced() if group == BALANCED else self.similarity.get(group)
        if tables is None:
            known = [*self.similarity, BALANCED] if self._balanced() else self.similarity
            raise PlanError(
                unknown_name("token group", group, known) if known else self.no_similarity()
            )
        if pack not in tables:
            have = ", ".join(str(each) for each in sorted(tables)) or "none"
            raise PlanError(
                f"Pack {pack} of group '{group}' was not scored (scored: {have}). "
                f"Score again with packs=(..., {pack}) or packs='all'."
            )
        return tables[pack]

    def has_pack(self, pack: int, group: str = "all") -> bool:
        """Tell whether `packs` would find the table."""
        tables = self._balanced() if group == BALANCED else self.similarity.get(group)
        return tables is not None and pack in tables

    def end(self, pack: int, group: str = "all") -> float | None:
        """Return the mean cosine of h_{L-pack} and h_L; None where it was not recorded."""
        if group != BALANCED:
            return self.tail.get(group, {}).get(pack)
        ends = [self.tail[each].get(pack) for each in _MODALITIES if each in self.tail]
        known = [value for value in ends if value is not None]
        return sum(known) / len(known) if known and len(known) == len(ends) else None

    def no_similarity(self) -> str:
        """Word the error for scores without any similarity."""
        first = next(iter(self.metrics), "")
        others = f", or judge by others, such as --weights {first}=1" if first else ""
        return f"The similarity was not scored. Score it too (--metrics similarity,...){others}."

    def _balanced(self) -> dict[int, tuple[float, ...]] | None:
        groups = [self.similarity[each] for each in _MODALITIES if each in self.similarity]
        if not groups:
            return None
        return {
            pack: tuple(sum(values) / len(groups) for values in zip(*tables, strict=True))
            for pack in groups[0]
            if len(tables := [group[pack] for group in groups if pack in group]) == len(groups)
        }

    def alignment_layers(self) -> dict[int, str]:
        """Return the layers that carry the alignment of image and text, with the reason in words.

        They are those of `alignment`, and of the values of the metric "alignment" the highest, one
        for every eight layers or part of eight.

        Raises:
            PlanError: the metric "alignment" was not scored.
        """
        if self.alignment is None:
            raise PlanError(
                "The layers that carry the alignment are not known: the metric 'alignment' was not "
                "scored. Score again with metrics=('similarity', 'alignment')."
            )
        found = dict(self.alignment)
        values = self.metrics.get("alignment", ())
        count = -(-len(values) // _LAYERS_PER_ALIGNED)
        ranked = sorted(range(len(values)), key=lambda layer: (-values[layer], layer))
        for rank, layer in enumerate(ranked[:count], start=1):
            why = (
                f"changes the likeness of image and text states by {values[layer]:.3f} "
                f"(rank {rank} of {len(values)})"
            )
            found[layer] = f"{found[layer]}; {why}" if layer in found else why
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Scores(Record):
    """The scores of a model, tower by tower.

    `print(scores)` shows them as a table per tower.

    Attributes:
        towers: tower name -> scores.
        shape: the sizes of the model, where known.
        model_name: name or path the model was opened by.
        settings: how it was scored (any JSON values).
    """

    kind: ClassVar[str] = "scores"
    # 2: TowerScores.alignment and .notes; 3: TowerScores.importance and TowerShape.sites
    schema: ClassVar[int] = 3

    towers: dict[str, TowerScores]
    shape: ModelShape | None = None
    model_name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, tower: str) -> TowerScores:
        """Return one tower's scores."""
        if tower not in self.towers:
            raise PlanError(unknown_name("tower", tower, self.towers))
        return self.towers[tower]

    def __str__(self) -> str:
        """Lay out what was measured of every layer, one table per tower."""
        return scores_text(self)

    @classmethod
    def from_similarity(
        cls,
        tower: str,
        packs: Mapping[int, Sequence[float]],
        num_layers: int,
        pinned: Mapping[int, str] | None = None,
        *,
        group: str = "all",
        tail: Mapping[int, float] | None = None,
        cross_attention_layers: Sequence[int] | None = None,
        num_samples: int = 0,
        model_name: str = "",
        shape: ModelShape | None = None,
    ) -> Scores:
        """Make scores of one tower from tables.

        Args:
            tower: name of the tower, such as "text".
            packs: pack p -> the L - p mean cosines of h_i and h_{i+p}.
            num_layers: L.
            pinned: layers that must be kept, with the reason.
            group: token group of the tables.
            tail: pack p -> mean cosine of h_{L-p} and h_L, where known.
            cross_attention_layers: layers with cross-attention, where only some have it.
            num_samples: samples behind the means.
            model_name: name of the model.
            shape: sizes of the model.

        Raises:
            ShapeError: a table is not of length L - p.
            DataError: a value is not finite or no cosine.
        """
        scores = TowerScores(
            num_layers=num_layers,
            similarity={group: {pack: tuple(values) for pack, values in packs.items()}},
            tail={group: dict(tail)} if tail else {},
            pinned=dict(pinned or {}),
            cross_attention_layers=(
                None if cross_attention_layers is None else tuple(cross_attention_layers)
            ),
            num_samples=num_samples,
        )
        return cls(towers={tower: scores}, shape=shape, model_name=model_name)

    def with_gates(self, report: HealReport) -> Scores:
        """Add gates of heads and neurons as metrics "head_gate" and "ffn_gate"; high = keep.

        Args:
            report: of healing with `gate_units`; these are the scores of the student it left.

        Raises:
            ConfigError: it is no such report, or has no such gates in a tower that is scored.
            ShapeError: the student has other widths than the model scored.
        """
        return add_gates(self, report)

    @staticmethod
    def merge(*scores: Scores) -> Scores:
        """Combine scores of one model: other towers, other metrics, or other samples.

        A table that stands in several is averaged, weighted by its number of samples: merging
        scores of the parts of a data set gives the scores of the whole.

        Raises:
            ConfigError: nothing to merge, no scores, or averaging without known numbers of samples.
            ShapeError: the scores are of different models.
        """
        if not scores:
            raise ConfigError("Scores.merge needs at least one Scores, got none.")
        odd = next((each for each in scores if not isinstance(each, Scores)), None)
        if odd is not None:
            raise ConfigError(
                f"Scores.merge was given a {type(odd).__name__}; give every Scores as an argument "
                "of its own (Scores.load reads a file)."
            )
        first = scores[0]
        towers: dict[str, TowerScores] = {}
        for each in scores:
            if each.model_name != first.model_name:
                raise ShapeError(
                    f"The scores are of different models: '{first.model_name}' and "
                    f"'{each.model_name}'. Merge scores of one model only."
                )
            for name, tower in each.towers.items():
                towers[name] = merged_tower(name, towers[name], tower) if name in towers else tower
        inputs = {f"scores{index}": each.fingerprint for index, each in enumerate(scores)}
        if "model" in first.inputs:
            inputs["model"] = first.inputs["model"]
        shape = next((each.shape for each in scores if each.shape is not None), None)
        return Scores(
            towers=towers,
            shape=shape,
            model_name=first.model_name,
            settings=first.settings,
            inputs=inputs,
        )
