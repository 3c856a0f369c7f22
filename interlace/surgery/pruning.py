"""prune: the layers that a plan drops are taken out of any tower of a model, the others narrowed.

Surgery is a transaction. It gives a student that has passed its own check, or raises; in both cases
the model that came in was only read.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from interlace._torch_utils import outside_inference_mode
from interlace.config import DEFAULT_RANK
from interlace.errors import ConfigError, PlanError
from interlace.models.bridges import run_time
from interlace.models.handle import VLM, check_vlm
from interlace.records import Plan, Provenance, PruneRecord
from interlace.surgery.bridges.fit import Fitted, fit_bridges
from interlace.surgery.bridges.names import (
    EVEN,
    NONE,
    bridges_by_tower,
    check_bridges,
    check_rank,
    check_token_weights,
)
from interlace.surgery.cuts import (
    Cut,
    check_cut,
    check_plan,
    original_depth,
    pinned_drops,
    read_cut,
)
from interlace.surgery.graft import graft_heads
from interlace.surgery.heads import ADVICE, check_widths, narrow_layers, state_widths, uneven_widths
from interlace.surgery.shell import (
    build_shell,
    carried_over,
    check_same_attributes,
    check_same_tree,
    fill,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel

    from interlace.data.samples import Sample
    from interlace.models.attention import Widths
    from interlace.models.discovery import DepthField

# Layers from this number on have windows. `layer_types` supersedes it, but other engines read it.
_FIRST_WINDOW = "max_window_layers"


@outside_inference_mode()
def prune(
    vlm: VLM,
    plan: Plan,
    *,
    allow_pinned: bool = False,
    bridges: str | Mapping[str, str] = NONE,
    data: Sequence[Sample] | Iterable[Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    rank: int = DEFAULT_RANK,
    token_weights: str = EVEN,
) -> VLM:
    """Make a student without the layers, parts, heads and neurons that a plan takes out.

    The student is a model of its own, built by transformers from its own config. Frozen parameters
    share their memory with `vlm`, until one of the two is moved to another device or dtype; the
    layers that the plan tunes have copies, and they alone have `requires_grad` set. Hooks and other
    run-time switches of `vlm` are not taken over; its train or eval mode is.

    A student may be pruned again. Its layers keep their numbers in the first model, which a plan
    counts in; a plan made from scores of the student itself, whose towers are as deep as the
    student's, is translated.

    Heads and neurons go with their rows and columns of every projection, biases and fused
    projections included (`Plan` says which; `make_plan` chooses them). With a plan that demands a
    standard checkpoint all layers of a tower must keep the same number of whole KV groups and of
    neurons, and the family's config must be able to state them; otherwise the student is one that
    only `open_model` loads (`student.record.standard` says which). Attention or the feed-forward
    part that a plan takes out whole leaves the residual stream alone, output bias included, and
    the attentions that are left take the first entries of the KV cache; that is never standard.

    Layers that other parts refer to by number (`vlm.towers[name].bound`) are refused; the other
    pinned ones, such as the last, are better kept but may go. With `allow_pinned` all can, and what
    refers to them follows: a DeepStack feature goes with the text layer that it was added after,
    and the other features stay at their own layers; a feature read from a dropped vision layer
    (DeepStack, `vision_feature_layer`) is read from the nearest kept layer below, which is what
    skipping the layer means; the relative position bias of T5 moves to the first kept block. What
    stock transformers cannot express is refused: two DeepStack features read at one place, Q-Former
    layers whose cross-attention would no longer be periodic, a text encoder and decoder of unequal
    depth where one config field counts both (BLIP for questions).

    Bridges stand in for the removed layers, fitted in closed form on calibration samples: "scale"
    gives the residual stream back its length, "fold" puts the effect of what was removed, layers
    or heads, neurons and parts of kept ones, into the last projection before it, and "refit" also
    fits the last projections of all kept layers from the first change of a tower on to what these
    layers gave in the whole model. All three live in the weights of a standard checkpoint and cost
    nothing at run time; weights that they change are the student's own, and train only where the
    plan says.
    "diagonal" and "lowrank" are modules at the cuts whose parameters train when healing; only
    `open_model` opens such a student. A cut without a place for a bridge stays without one, and the
    manifest says why. See docs/math/bridges.md.

    Args:
        vlm: the model; left exactly as it is.
        plan: layers to drop and to tune, in original numbers. Towers that it does not name stay
            whole.
        allow_pinned: drop pinned layers too, where the family can express it.
        bridges: "none", "scale", "fold", "refit", "diagonal" or "lowrank" for all towers that lose
            layers (with "fold" and "refit" also those that lose heads, neurons or parts), or tower
            name -> one of these; towers that it leaves out get none.
        data: what to fit bridges on, apart from the data to measure on: samples, which are fed with
            their answers, or ready batches that the model's forward takes as keyword arguments;
            they stay in memory, and so do some hidden states of every token and what other towers
            give in front of the one that is repaired. Default: 512 of the built-in scenes, which
            the manifest then notes.
        batch_size: samples per forward pass when fitting.
        rank: of low-rank bridges, at least 1; at most the width is used.
        token_weights: what counts in the fits: all tokens "even", or each by how much the
            predictions of `vlm` hang on it, layer by layer: "fisher". That takes answers, or labels
            in the batches, and a forward and four backward passes per batch, without weights.

    Returns:
        The student; `student.plan` is the plan, `student.record` the manifest,
        `student.towers[name].original` the original number of every position.

    Raises:
        PlanError: the plan is of another model, names unknown towers or layers, drops pinned layers
            or leaves fewer than 2 layers, or a layer no heads; the model has run-time bridges or is
            not as transformers builds it (adapters, quantised or fused modules); or stock
            transformers cannot express the result although the plan demands it, a bridge included.
        ConfigError: unknown bridges or token weights; these, a rank or data without bridges that
            use them; samples for a model without processor.
        DataError: data for bridges that cannot be used, or less than 4 samples of it.
    """
    check_vlm(vlm, "model")
    check_bridges(bridges)
    check_token_weights(token_weights, bridges)
    check_rank(rank, bridges)
    if vlm.record is not None and run_time(vlm.record.bridges):
        raise PlanError(
            f"{vlm.name} has run-time bridges, which stock transformers does not build, so it "
            "cannot be cut again. Prune the model that it was made from by one plan."
        )
    fingerprint = vlm.fingerprint
    check_plan(vlm, plan, fingerprint)
    cuts = {name: read_cut(vlm, name, tower) for name, tower in plan.towers.items()}
    for cut in cuts.values():
        check_cut(cut, allow_pinned)
    pruned = [name for name, cut in cuts.items() if cut.plan.drop]
    changed = [name for name, cut in cuts.items() if name in pruned or cut.plan.losing()]
    wanted = bridges_by_tower(bridges, pruned, changed, vlm.towers)
    if data is not None and not wanted:
        raise ConfigError(
            f"prune reads data only to fit bridges, and bridges={bridges!r} asks for none in this "
            "plan. Name a bridge, such as bridges='fold', or leave the data out."
        )
    depths = {name: tower.num_layers for name, tower in vlm.towers.items()}
    vlm.family.check_depths(depths | {name: len(cut.kept) for name, cut in cuts.items()})
    check_widths(vlm, plan, cuts.values())

    draft = build_shell(vlm.model, copy.deepcopy(vlm.model.config), vlm.widths())
    check_same_tree(
        draft,
        vlm.model,
        f"{type(vlm.model).__name__} is not as transformers builds it from its config, so it "
        "cannot be cut. Merge or remove adapters, unfuse, and load it without quantisation and on "
        "one device.",
    )
    by_hand = carried_over(draft, vlm.model)
    fill(draft, vlm.model)
    changes = _apply(vlm, draft, [cut for cut in cuts.values() if cut.plan.drop])
    narrow_layers(draft, cuts.values())
    graft_heads(draft, cuts.values())
    widths = uneven_widths(vlm, plan, draft, cuts)
    if plan.standard:
        changes |= state_widths(vlm.family, draft, cuts.values())
    model = _finish(vlm.model, draft, list(cuts.values()), by_hand, widths)
    del draft, by_hand  # narrowed weights of its own: fitting needs the memory
    fit = (vlm, model, cuts, wanted, data, batch_size, rank, token_weights)
    fitted = fit_bridges(*fit) if wanted else Fitted()
    return _hand_over(vlm, plan, cuts, model, changes, fingerprint, widths, fitted)


def _apply(vlm: VLM, draft: PreTrainedModel, cuts: Sequence[Cut]) -> dict[str, tuple[Any, Any]]:
    """Cut the towers of the draft, and bring its configs and index maps in line.

    Returns:
        Dotted config key -> (before, after).
    """
    family = vlm.family
    changes: dict[str, tuple[Any, Any]] = {}
    # All of it is looked up before the first cut: a family reads the depths that the configs state.
    depths = {cut.tower.name: family.depth_fields(draft, cut.tower.name) for cut in cuts}
    lists = {
        cut.tower.name: [
            (field, list(getattr(field.config, field.key)))
            for field in family.per_layer_lists(draft, cut.tower.name)
        ]
        for cut in cuts
    }
    layers = {cut.tower.name: _layers(draft, cut.tower.path) for cut in cuts}
    for cut in cuts:
        name = cut.tower.name
        owner, _, leaf = cut.tower.path.rpartition(".")
        setattr(draft.get_submodule(owner), leaf, nn.ModuleList(layers[name][i] for i in cut.kept))
        for field, entries in lists[name]:
            _write(field, [entries[i] for i in cut.kept], changes)
        for field in {id(field.config): field for field in depths[name]}.values():
            _cut_windows(field, cut, changes)
            _cut_overrides(field, cut, changes)
        for field in depths[name]:
            _write(field, len(cut.kept), changes)
    for cut in cuts:
        name = cut.tower.name
        changes |= family.remap(draft, name, cut.kept, layers[name])
    return changes


def _layers(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def _write(field: DepthField, value: Any, changes: dict[str, tuple[Any, Any]]) -> None:
    before = getattr(field.config, field.key)
    if before == value:
        return
    setattr(field.config, field.key, value)
    # A copy that a module keeps is not saved; it is built anew from the config that is.
    if ":" not in field.path:
        changes[field.path] = (before, value)


def _cut_windows(field: DepthField, cut: Cut, changes: dict[str, tuple[Any, Any]]) -> None:
    first = getattr(field.config, _FIRST_WINDOW, None)
    if isinstance(first, int) and first <= cut.tower.num_layers:
        below = sum(1 for position in cut.kept if position < first)
        path = field.path.removesuffix(field.key) + _FIRST_WINDOW
        _write(replace(field, key=_FIRST_WINDOW, path=path), below, changes)


def _cut_overrides(field: DepthField, cut: Cut, changes: dict[str, tuple[Any, Any]]) -> None:
    """Renumber the sparse per-layer settings that a config may hold (transformers >= 5.20)."""
    config: Any = field.config
    if not getattr(config, "is_heterogeneous", False):
        return
    before = config.to_dict()["per_layer_config"]
    by_layer = {int(layer): settings for layer, settings in before.items()}
    after = {new: by_layer[old] for new, old in enumerate(cut.kept) if old in by_layer}
    config.per_layer_config = after
    changes[field.path.removesuffix(field.key) + "per_layer_config"] = (
        before,
        {str(layer): settings for layer, settings in after.items()},
    )


def _finish(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    cuts: Sequence[Cut],
    by_hand: Mapping[int, Mapping[str, Any]],
    widths: Mapping[str, Widths],
) -> PreTrainedModel:
    """Build the student from the draft's config, check it against the draft and fill it.

    Raises:
        PlanError: transformers builds something else from the config than what is left of the
            model.
    """
    student = build_shell(model, copy.deepcopy(draft.config), widths)
    advice = ADVICE if any(cut.plan.cut for cut in cuts) else "Choose another one."
    check_same_tree(student, draft, f"The config cannot state this cut. {advice}")
    check_same_attributes(student, draft, _Moves(cuts))
    modules = dict(student.named_modules(remove_duplicate=False))
    for name, module in draft.named_modules(remove_duplicate=False):
        for key, value in by_hand.get(id(module), {}).items():
            setattr(modules[name], key, value)
    tuned = tuple(f"{cut.tower.path}.{i}." for cut in cuts for i in cut.tuned)
    fill(student, draft, own=lambda name: name.startswith(tuned))
    if not any(cut.plan.drop or cut.plan.tune or cut.plan.losing() for cut in cuts):
        # torch picks matrix kernels by this flag, so a whole copy equals its source to the last
        # bit only with the same flags
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(model.get_parameter(name).requires_grad)
    student.train(model.training)
    if hasattr(model, "generation_config"):
        student.generation_config = _generation_config(model, cuts)
    return student


class _Moves:
    """Numbers that a cut changes: inside a kept layer its index, elsewhere the depths."""

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self._layers = {
            f"{cut.tower.path}.{new}": {old: new}
            for cut in cuts
            for new, old in enumerate(cut.kept)
        }
        self._depths = {cut.tower.num_layers: len(cut.kept) for cut in cuts}

    def __call__(self, name: str) -> Mapping[int, int]:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            layer = ".".join(parts[:length])
            if layer in self._layers:
                return self._layers[layer]
        return self._depths


def _generation_config(model: PreTrainedModel, cuts: Sequence[Cut]) -> Any:
    """Copy the generation settings; a layer to leave early at moves along with the text tower."""
    settings: Any = copy.deepcopy(model.generation_config)
    early = getattr(settings, "assistant_early_exit", None)
    for cut in cuts:
        if cut.tower.name == "text" and isinstance(early, int):
            settings.assistant_early_exit = max(1, sum(1 for i in cut.kept if i < early))
    return settings


def _hand_over(
    vlm: VLM,
    plan: Plan,
    cuts: Mapping[str, Cut],
    model: PreTrainedModel,
    changes: Mapping[str, tuple[Any, Any]],
    fingerprint: str,
    widths: Mapping[str, Widths],
    fitted: Fitted,
) -> VLM:
    """Wrap the student with its plan and its manifest, which tells of all cuts since the first."""
    earlier = vlm.record
    bridges = (*(earlier.bridges if earlier is not None else ()), *fitted.bridges)
    kept = {
        name: cuts[name].original if name in cuts else tower.original
        for name, tower in vlm.towers.items()
    }
    dropped = {
        name: tuple(sorted(set(range(original_depth(vlm, name))) - set(layers)))
        for name, layers in kept.items()
    }
    since = dict(earlier.config_changes) if earlier is not None else {}
    for key, (before, after) in changes.items():
        since[key] = [since[key][0] if key in since else before, after]
    notes = [
        f"{name} layer {layer} was dropped although pinned: {reason}"
        for name, cut in cuts.items()
        for layer, reason in pinned_drops(cut).items()
    ]
    student = VLM(
        model,
        vlm.family,
        processor=vlm.processor,
        name=vlm.name,
        record=PruneRecord(
            plan_fingerprint=plan.fingerprint,
            towers=kept,
            dropped={name: layers for name, layers in dropped.items() if layers},
            config_changes=since,
            parameters_before=vlm.num_parameters()
            if earlier is None
            else earlier.parameters_before,
            parameters_after=sum(parameter.numel() for parameter in model.parameters()),
            standard=not widths and not run_time(bridges),
            widths={
                name: {
                    kept[name][i]: {site: tuple(groups) for site, groups in sites.items()}
                    for i, sites in widths[tower.path].items()
                }
                for name, tower in vlm.towers.items()
                if tower.path in widths
            },
            bridges=bridges,
            notes=(*(earlier.notes if earlier is not None else ()), *notes, *fitted.notes),
            inputs={"model": fingerprint, "plan": plan.fingerprint, **fitted.inputs},
            provenance=Provenance.collect(plan.seed),
        ),
        plan=_in_original_numbers(plan, cuts),
    )
    for name, layers in kept.items():
        if student.towers[name].num_layers != len(layers):
            raise PlanError(
                f"The student's {name} tower has {student.towers[name].num_layers} layers instead "
                f"of {len(layers)}."
            )
    return student


def _in_original_numbers(plan: Plan, cuts: Mapping[str, Cut]) -> Plan:
    towers = {name: cut.plan for name, cut in cuts.items()}
    return plan if towers == plan.towers else replace(plan, towers=towers)
