"""Plan: what happens to every layer of the original model; PruneRecord: what was done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from interlace._coerce import Checked
from interlace._records.base import Record
from interlace._records.plan_text import plan_text
from interlace._records.shape import ModelShape  # noqa: TC001 (read at run time by Checked)
from interlace.errors import PlanError, unknown_name

Action = Literal["drop", "tune", "freeze", "keep"]

# more than any model has; a damaged file is to be refused before its layers are counted
_MOST_LAYERS = 100_000


@dataclass(frozen=True)
class TowerPlan(Checked):
    """The plan of one tower; all layers count in the original model.

    Attributes:
        num_layers: layers of the original tower.
        drop: layers to remove, in selection order.
        tune: layers to train when healing, in selection order.
        freeze: anchors of the triplets, in selection order; kept and frozen.
        layer_scores: the score each layer was judged by; None where the rule has none.
        reasons: layer -> why it is dropped, tuned, frozen or protected, in words.
        cut: place in a layer, such as "self_attn" or "mlp" -> kept layer -> the units taken out
            there, ascending: query heads, or neurons. Units count in the model that is cut. A KV
            head goes with the last of its query heads.
        parts: place in a layer -> kept layers, ascending, that lose it whole: attention, or the
            feed-forward part.
        graft: kept layer -> dropped layer -> KV groups of its attention, ascending, that go on
            working in the kept one beside its own.
    """

    num_layers: int
    drop: tuple[int, ...] = ()
    tune: tuple[int, ...] = ()
    freeze: tuple[int, ...] = ()
    layer_scores: tuple[float | None, ...] = ()
    reasons: dict[int, str] = field(default_factory=dict)
    cut: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    graft: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)

    def _check(self) -> None:
        if not 0 < self.num_layers <= _MOST_LAYERS:
            raise PlanError(
                f"num_layers is {self.num_layers}; a tower has between 1 and {_MOST_LAYERS} layers."
            )
        for target, sources in self.graft.items():
            if target in self.drop or not 0 <= target < self.num_layers:
                raise PlanError(f"Heads are grafted into layer {target}, which is not kept.")
            for source, groups in sources.items():
                if source not in self.drop:
                    raise PlanError(f"Heads are grafted from layer {source}, which is not dropped.")
                if not groups or list(groups) != sorted({each for each in groups if each >= 0}):
                    raise PlanError(
                        f"The KV groups grafted from layer {source} must be ascending numbers of "
                        "at least 0, each once, and at least one."
                    )
        kept = set(self.kept)
        for site, lost in self.parts.items():
            if not set(lost) <= kept or list(lost) != sorted(set(lost)):
                raise PlanError(
                    f"'{site}' is taken out of the layers {list(lost)}; they must be kept ones, "
                    "ascending, each once."
                )
            both = sorted(set(self.cut.get(site, {})) & set(lost))
            if both:
                raise PlanError(
                    f"The plan both cuts units of '{site}' and takes it out whole in the layers "
                    f"{both}. Do one of the two."
                )
        for site, layers in self.cut.items():
            wrong = sorted(set(layers) - kept)
            if wrong:
                raise PlanError(f"Units of '{site}' are cut in the layers {wrong}, not kept ones.")
            for layer, units in layers.items():
                if list(units) != sorted({unit for unit in units if unit >= 0}):
                    raise PlanError(
                        f"The units cut from '{site}' of layer {layer} must be ascending numbers "
                        "of at least 0, each once."
                    )
        named = [*self.drop, *self.tune, *self.freeze]
        outside = sorted({each for each in named if not 0 <= each < self.num_layers})
        if outside:
            raise PlanError(
                f"The tower has layers 0..{self.num_layers - 1}; the plan names {outside}."
            )
        twice = sorted({each for each in named if named.count(each) > 1})
        if twice:
            raise PlanError(f"The layers {twice} stand more than once in drop, tune and freeze.")
        if len(self.drop) >= self.num_layers:
            raise PlanError(f"The plan drops all {self.num_layers} layers of the tower.")
        if not self.layer_scores:
            object.__setattr__(self, "layer_scores", (None,) * self.num_layers)
        if len(self.layer_scores) != self.num_layers:
            raise PlanError(
                f"layer_scores has {len(self.layer_scores)} values for {self.num_layers} layers."
            )

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers that stay, ascending: position p of the student is original layer kept[p]."""
        gone = set(self.drop)
        return tuple(layer for layer in range(self.num_layers) if layer not in gone)

    def losing(self) -> set[int]:
        """Return the kept layers that lose units or a part."""
        places = (*self.cut.values(), *self.parts.values())
        return {layer for layers in places for layer in layers}

    def action(self, layer: int) -> Action:
        """Return what happens to a layer of the original tower."""
        if not 0 <= layer < self.num_layers:
            raise PlanError(f"The tower has layers 0..{self.num_layers - 1}, not {layer}.")
        if layer in self.drop:
            return "drop"
        if layer in self.tune:
            return "tune"
        return "freeze" if layer in self.freeze else "keep"


@dataclass(frozen=True)
class Plan(Record):
    """What happens to every layer of the planned towers; towers not named stay as they are.

    Attributes:
        towers: tower name -> its plan.
        rule: name of the rule that chose the layers.
        seed: seed of the rule, where it draws.
        model_name: name or path the model was opened by.
        shape: sizes of the original model, where known.
        settings: the other arguments of the choice (any JSON values).
        standard: the result must load in plain transformers, but for run-time bridges that are
            asked for beside the plan. Without it, widths that no config of the family can state are
            allowed; only `open_model` loads the result then.
    """

    kind: ClassVar[str] = "plan"
    # 2: standard, TowerPlan.cut, .parts and .graft, TowerShape.sites
    schema: ClassVar[int] = 2

    towers: dict[str, TowerPlan]
    rule: str = "by hand"
    seed: int | None = None
    model_name: str = ""
    shape: ModelShape | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    standard: bool = True

    def __getitem__(self, tower: str) -> TowerPlan:
        """Return one tower's plan."""
        if tower not in self.towers:
            raise PlanError(unknown_name("tower", tower, self.towers))
        return self.towers[tower]

    def __str__(self) -> str:
        """Return the plan as a table, a strip per tower and what it saves."""
        return plan_text(self)

    @property
    def dropped(self) -> dict[str, tuple[int, ...]]:
        """Tower name -> layers to remove, in selection order."""
        return {name: tower.drop for name, tower in self.towers.items()}


@dataclass(frozen=True)
class Bridge(Checked):
    """What stands in for one run of adjacent removed layers, or what a kept layer was refitted to.

    Numbers count in the original model.

    Attributes:
        tower: tower name.
        kind: name of the bridge, such as "fold"; "none" where there is none, and `note` says why.
        dropped: the removed layers; none where a kept layer was refitted.
        after: the kept layer before them, which was changed; None where there is none.
        error_before: squared distance of the student's hidden states behind it from those of
            the original model, over their squared size, on held-out samples, without this bridge.
        error_after: the same with it.
        settings: what was chosen for it, such as its "ridge" or "factor" (any JSON values).
        note: why there is no bridge.
    """

    tower: str
    kind: str
    dropped: tuple[int, ...]
    after: int | None = None
    error_before: float | None = None
    error_after: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class PruneRecord(Record):
    """What surgery did to a model; also the manifest in its checkpoint, `interlace.json`.

    Attributes:
        plan_fingerprint: fingerprint of the plan that was carried out.
        towers: tower name -> kept original layers, ascending; every tower of the model.
        dropped: tower name -> removed original layers.
        config_changes: dotted config key -> [before, after].
        parameters_before: parameters of the original model.
        parameters_after: parameters of the student.
        standard: the checkpoint loads in plain transformers.
        widths: what the config of a checkpoint that is not standard cannot state: tower ->
            original layer -> place in the layer -> query heads of every KV head, or the number of
            neurons; empty where the place was taken out whole.
        bridges: what stands in for the removed layers, one entry per cut, and the refitted layers,
            front to back; empty without bridges.
        notes: anything a user of the student should know.
    """

    kind: ClassVar[str] = "prune"
    # 2: bridges; 3: widths
    schema: ClassVar[int] = 3

    plan_fingerprint: str
    towers: dict[str, tuple[int, ...]]
    dropped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    config_changes: dict[str, list[Any]] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    standard: bool = True
    widths: dict[str, dict[int, dict[str, tuple[int, ...]]]] = field(default_factory=dict)
    bridges: tuple[Bridge, ...] = ()
    notes: tuple[str, ...] = ()

    def _check(self) -> None:
        for name, gone in self.dropped.items():
            both = sorted(set(gone) & set(self.towers.get(name, ())))
            if both:
                raise PlanError(f"Tower '{name}': the layers {both} are both kept and dropped.")
        if self.standard and self.widths:
            raise PlanError("A standard checkpoint has no widths beside its config.")
        for key, change in self.config_changes.items():
            if len(change) != 2:
                raise PlanError(f"config_changes['{key}'] must be [before, after], got {change}.")
