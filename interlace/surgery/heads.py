"""Width surgery: query heads with their key and value heads, and neurons, taken out of layers.

What is cut is a site of a layer (`interlace.models.sites`): the rows of the projections that feed
its units, and the columns of the one that reads them. The kept units compute what they computed, up
to the rounding of smaller matrix products; the output of the layer lacks the summands of the
others. A site taken out whole, attention or the feed-forward part, adds nothing, its output bias
included.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from interlace.errors import PlanError, unknown_name
from interlace.models.attention import adapt
from interlace.models.sites import find_sites, narrow, resize
from interlace.surgery.graft import attention_of
from interlace.surgery.shell import REFUSALS, build_shell, check_same_tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn
    from transformers import PreTrainedModel

    from interlace.models.attention import Widths
    from interlace.models.family import Changes, Family
    from interlace.models.handle import VLM
    from interlace.models.sites import Site
    from interlace.records import Plan
    from interlace.surgery.cuts import Cut

# Config fields that count query heads and neurons, whatever the family calls them.
_HEADS = ("num_attention_heads", "num_heads", "n_head", "decoder_attention_heads")
_NEURONS = ("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim")
ADVICE = (
    "Plan it with standard=False or --spread global (only interlace.open_model loads the result "
    "then), or cut neurons and layers only, and towers that share a config all alike."
)


def check_widths(vlm: VLM, plan: Plan, cuts: Iterable[Cut]) -> None:
    """Check that the units that a plan takes out are there, and that some are left.

    Raises:
        PlanError: a layer lacks the place or the units, would lose all of them, or its heads
            cannot be told apart from those of other layers.
    """
    for cut in cuts:
        if plan.standard and cut.plan.graft:
            raise PlanError(
                f"Grafting gives layers of the {cut.tower.name} tower more heads than others have, "
                "which a standard checkpoint cannot state. Plan it with standard=False."
            )
        for name, layers in cut.plan.cut.items():
            if plan.standard and vlm.record is not None and vlm.record.widths:
                raise PlanError(
                    f"{vlm.name} already has widths that its config cannot state, so a plan that "
                    f"demands a standard checkpoint cannot be carried out. {ADVICE}"
                )
            for layer, units in layers.items():
                sites = find_sites(cut.tower.layers[cut.tower.position(layer)])
                where = f"layer {layer} of the {cut.tower.name} tower"
                if name not in sites:
                    raise PlanError(
                        f"In {where}: {unknown_name('place that can be narrowed', name, sites)}"
                    )
                _check_units(sites[name], units, where)
        for name, lost in cut.plan.parts.items():
            for layer in lost:
                _check_part(plan, cut, name, layer)


def _check_part(plan: Plan, cut: Cut, name: str, layer: int) -> None:
    lost = cut.plan.parts[name]
    where = f"layer {layer} of the {cut.tower.name} tower"
    sites = find_sites(cut.tower.layers[cut.tower.position(layer)])
    if name not in sites:
        raise PlanError(f"In {where}: {unknown_name('place that can be taken out', name, sites)}")
    site = sites[name]
    if plan.standard:
        raise PlanError(
            f"The plan takes '{name}' out of {where}, which a standard checkpoint cannot state. "
            "Plan it with standard=False (only interlace.open_model loads the result then), or "
            "drop whole layers only."
        )
    if site.cross:
        raise PlanError(
            f"'{name}' of {where} attends to another tower; cross-attention cannot be taken out "
            "alone. Drop the layer, or take out its self-attention or feed-forward part."
        )
    if not site.groups:
        raise PlanError(f"'{name}' of {where} is gone already. Leave it out of the plan.")
    if site.kind == "ffn":
        return
    if layer in cut.plan.graft:
        raise PlanError(
            f"The plan grafts heads into the attention of {where}, and takes that attention out."
        )
    if site.biased and layer == cut.original[0]:
        raise PlanError(
            f"'{name}' of {where} computes the relative position bias that all layers of the stack "
            "use, so it cannot be taken out. Take it out of later layers, and protect this one "
            "when planning."
        )
    found = {each: find_sites(cut.tower.layers[cut.tower.position(each)]) for each in cut.original}
    # recurrent layers among others have none
    attentions = {each: own[name] for each, own in found.items() if name in own}
    # a KV cache reads how long it is from the entry of the first layer, or one of its kind
    kinds = {each: getattr(own.module, "sliding_window", None) for each, own in attentions.items()}
    left = [each for each, own in attentions.items() if own.groups and each not in lost]
    if not any(kinds[each] == kinds[next(iter(kinds))] for each in left):
        raise PlanError(
            f"The plan leaves no layer of the {cut.tower.name} tower its attention, or none with "
            "the window of the first layer; at least one such layer must keep it."
        )


def _check_units(site: Site, units: tuple[int, ...], where: str) -> None:
    outside = [unit for unit in units if unit >= site.num_units]
    if outside:
        raise PlanError(
            f"The plan cuts the units {outside[:4]} of '{site.name}' in {where}, which has "
            f"{site.num_units}. Units count in the model that is cut; score it and plan again."
        )
    if len(units) == site.num_units:
        raise PlanError(
            f"The plan cuts all {site.num_units} units of '{site.name}' in {where}; at least one "
            "must stay. Cut fewer, name the place under `parts` to take it out whole, or drop the "
            "layer."
        )
    if units and site.biased:
        raise PlanError(
            f"Heads of {type(site.module).__name__} cannot be cut: all layers of the stack share "
            "one relative position bias per head number, so heads of different layers are not "
            "independent of each other. Cut neurons and layers of this tower."
        )


def narrow_layers(draft: nn.Module, cuts: Iterable[Cut]) -> None:
    """Take the units out of the layers of a draft, whose towers are already cut in depth."""
    for cut in cuts:
        layers: Any = draft.get_submodule(cut.tower.path)
        for name, by_layer in cut.plan.cut.items():
            for layer, units in by_layer.items():
                site = find_sites(layers[cut.original.index(layer)])[name]
                gone = set(units)
                if gone:
                    narrow(site, [unit for unit in range(site.num_units) if unit not in gone])
        for name, lost in cut.plan.parts.items():
            for layer in lost:
                resize(find_sites(layers[cut.original.index(layer)])[name], ())
        adapt(layers)


def uneven_widths(
    vlm: VLM, plan: Plan, draft: nn.Module, cuts: Mapping[str, Cut]
) -> dict[str, Widths]:
    """Return the widths of a draft that its config does not state.

    Returns:
        Path of a tower -> position -> place -> query heads of every KV head, or neurons. Empty for
        a standard student.
    """
    widths: dict[str, Widths] = {}
    earlier = vlm.widths()
    for name, tower in vlm.towers.items():
        own: set[str] = set()
        if name in cuts and not plan.standard:
            own = {*cuts[name].plan.cut, *cuts[name].plan.parts}
        for layer in cuts[name].plan.graft if name in cuts else ():
            own.add(attention_of(tower.layers[tower.position(layer)], f"layer {layer}").name)
        own |= {site for sites in earlier.get(tower.path, {}).values() for site in sites}
        if own:
            layers: Any = draft.get_submodule(tower.path)
            widths[tower.path] = {
                position: {n: site.groups for n, site in find_sites(layer).items() if n in own}
                for position, layer in enumerate(layers)
            }
    return widths


def state_widths(family: Family, draft: PreTrainedModel, cuts: Iterable[Cut]) -> Changes:
    """Write the widths of a draft into its config, where all layers of a tower have the same.

    Returns:
        Dotted config key -> (before, after).

    Raises:
        PlanError: the layers differ, or the config has no place for it; says what to do.
    """
    changes: Changes = {}
    stated: dict[str, list[str]] = {}
    try:
        for cut in cuts:
            for kind in dict.fromkeys(
                site.kind for name, site in _whole(cut).items() if name in cut.plan.cut
            ):
                old, new = _uniform(draft, cut, kind)
                place = next(
                    s for s in family.depth_fields(draft, cut.tower.name) if ":" not in s.path
                )
                config: Any = place.config
                stated.setdefault(type(config).__name__, []).append(_wording(old, new))
                for key, value in _entries(config, old, new).items():
                    path = place.path.removesuffix(place.key) + key
                    changes[path] = (getattr(config, key, None), value)
                    setattr(config, key, value)
        if changes:
            # a value that the running config takes may still be refused on loading
            type(draft.config).from_dict(draft.config.to_dict())
    except REFUSALS as error:
        raise _refusal(stated, error) from error
    if changes:
        try:
            trial = build_shell(draft, copy.deepcopy(draft.config))
            check_same_tree(trial, draft, "Other parts follow from the same fields.")
        except PlanError as error:
            raise _refusal(stated, error) from error
    return changes


def _whole(cut: Cut) -> dict[str, Site]:
    return find_sites(cut.tower.layers[0]) if cut.plan.cut else {}


def _uniform(draft: nn.Module, cut: Cut, kind: str) -> tuple[Site, tuple[int, ...]]:
    """Return a site before the cut, and the groups that all of its kind have after it.

    Raises:
        PlanError: they are not the same in all layers, or uneven.
    """
    layers: Any = draft.get_submodule(cut.tower.path)
    groups = {
        site.groups for layer in layers for site in find_sites(layer).values() if site.kind == kind
    }
    new = next(iter(groups))
    if len(groups) > 1 or len(set(new)) > 1:
        counts = sorted({sum(each) for each in groups})
        raise PlanError(
            f"The layers of the {cut.tower.name} tower would keep unequal numbers of "
            f"{'heads' if kind == 'heads' else 'neurons'} ({counts}, or unequally many per KV "
            f"head), which a standard checkpoint cannot state. {ADVICE}"
        )
    return next(site for site in _whole(cut).values() if site.kind == kind), new


def _refusal(stated: Mapping[str, list[str]], error: Exception) -> PlanError:
    told = " and ".join(
        f"{name} cannot state {' with '.join(widths)}" for name, widths in stated.items()
    )
    why = " ".join(str(error).split()).rstrip(".")
    return PlanError(f"{told}: {why}. {ADVICE}")


def _wording(old: Site, new: tuple[int, ...]) -> str:
    if old.kind == "ffn":
        return f"{sum(new)} neurons"
    return f"{sum(new)} heads of {old.head_dim} columns ({len(new)} KV heads)"


def _entries(config: Any, old: Site, new: tuple[int, ...]) -> dict[str, Any]:
    """Return the config fields that state a width, with their new values."""
    stated = vars(config)
    if old.kind == "heads":
        made = {key: sum(new) for key in _HEADS if stated.get(key) == old.num_units}
        if stated.get("num_key_value_heads") is not None:
            made["num_key_value_heads"] = len(new)
        # else transformers divides the width of the model by the heads
        if stated.get("head_dim") is None and "d_kv" not in stated:
            made["head_dim"] = old.head_dim
        return made
    made = {key: sum(new) for key in _NEURONS if stated.get(key) == old.num_units}
    if not made and "mlp_ratio" in stated:
        ratio = sum(new) / old.output.out_features
        return {"mlp_ratio": int(ratio) if ratio.is_integer() else ratio}
    return made
