"""Grafting: KV groups of a dropped layer go on working inside a kept neighbour, in parallel.

Legend: D size of a head, x the normalised hidden state before gain and bias of a norm.

The rows and columns of the groups are appended to the projections of the neighbour. In the dropped
layer they read g_s * x + b_s, here they are given g_t * x + b_t, so that

    W' = W diag(g_s / g_t)        bias' = bias + W b_s - W' b_t

make them see exactly what they saw, of the hidden state that the neighbour reads. What remains is
that they no longer run one after the other: with the attentions A_s and A_t of the two layers,

    before   h + A_s(h) + A_t(h + A_s(h))        after   h + A_s(h) + A_t(h)

differ by A_t(h + A_s(h)) - A_t(h), about A_t'(h) A_s(h), of second order in what the two layers add
to the stream. The feed-forward part of the dropped layer is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import PlanError
from interlace.models.attention import adapt
from interlace.models.sites import KV_MAP, find_sites, resize, rows_of
from interlace.surgery.shell import plain_attributes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from interlace.models.sites import Site
    from interlace.surgery.cuts import Cut

# What the norm in front of the attention of a layer is called.
_NORMS = ("input_layernorm", "norm1", "layer_norm1", "self_attn_layer_norm")
_HEAD_NORMS = ("q_norm", "k_norm")
# Attributes by which two attentions of one tower may differ: their place and their width.
_FREE = (
    "layer_idx", "num_heads", "num_attention_heads", "num_key_value_heads",
    "num_key_value_groups", KV_MAP,
)  # fmt: skip
_NUM_PROBES = 4
_ADVICE = "Plan without grafting (graft=None), or graft between other layers."


def graft_heads(draft: nn.Module, cuts: Iterable[Cut]) -> None:
    """Append the groups that a plan saves from dropped layers to the layers that take them.

    Args:
        draft: the model, cut in depth and width already; changed in place.
        cuts: the towers with their plans, and the layers as they were.

    Raises:
        PlanError: the heads would not see or compute what they did; says why.
    """
    for cut in cuts:
        layers: Any = draft.get_submodule(cut.tower.path)
        for target, sources in cut.plan.graft.items():
            taker = layers[cut.original.index(target)]
            for source, groups in sources.items():
                giver = cut.tower.layers[cut.tower.position(source)]
                where = f"layer {source} into layer {target} of the {cut.tower.name} tower"
                _graft(taker, giver, groups, where)
        if cut.plan.graft:
            adapt(layers)


def attention_of(layer: nn.Module, where: str) -> Site:
    """Return the one attention of a layer that reads its own tower.

    Raises:
        PlanError: it has none, or several.
    """
    found = [site for site in find_sites(layer).values() if site.kind == "heads"]
    if len(found) != 1 or found[0].cross or found[0].biased:
        raise PlanError(
            f"Heads cannot be grafted from {where}: its layers need exactly one attention, without "
            f"a learned position bias, but have {len(found)}. {_ADVICE}"
        )
    return found[0]


def _graft(taker: nn.Module, giver: nn.Module, groups: tuple[int, ...], where: str) -> None:
    own, other = attention_of(taker, where), attention_of(giver, where)
    outside = [group for group in groups if group >= len(other.groups)]
    if outside:
        raise PlanError(
            f"The plan grafts the KV groups {outside} from {where}, but there are "
            f"{len(other.groups)}."
        )
    _check_alike(own.module, other.module, where)
    scale, shift = _norm_between(taker, giver, where)
    units = [unit for unit, kv in enumerate(other.kv_of) if kv in set(groups)]
    rows, columns = rows_of(other, units)
    counts = [own.groups[kv] for kv in range(len(own.groups))]
    counts += [other.groups[group] for group in sorted(groups)]
    before: list[tuple[torch.Tensor, Any]]
    before = [(linear.weight.detach(), linear.bias) for linear in own.inputs]
    output = own.output.weight.detach()
    # query, key and value rows come one after the other where they are one projection
    blocks = 3 if len(own.inputs) == 1 else 1
    resize(own, counts)
    with torch.no_grad():
        for linear, (weight, bias), source, chosen in zip(
            own.inputs, before, other.inputs, rows, strict=True
        ):
            grafted = source.weight.detach()[chosen.to(source.weight.device)].double()
            moved = grafted * scale
            _join(linear.weight, weight, moved, blocks)
            constant = grafted @ shift
            if bias is not None:
                kept = source.bias.detach()[chosen.to(source.bias.device)].double()
                _join(linear.bias, bias.detach(), kept + constant, blocks)
            elif bool(constant.abs().max() > 0):
                raise PlanError(
                    f"Heads cannot be grafted from {where}: the norms differ in their biases, and "
                    f"the projections have none to take up the difference. {_ADVICE}"
                )
        tail = other.output.weight.detach()[:, columns.to(other.output.weight.device)]
        own.output.weight.copy_(torch.cat([output, tail.to(output)], dim=1))
        if own.output.bias is not None:
            # what the dropped attention adds whatever its heads say
            own.output.bias = type(own.output.bias)(
                own.output.bias.detach() + other.output.bias.detach(), requires_grad=False
            )


def _join(into: torch.Tensor, own: torch.Tensor, more: torch.Tensor, blocks: int) -> None:
    pairs = zip(own.chunk(blocks), more.to(own).chunk(blocks), strict=True)
    into.copy_(torch.cat([part for pair in pairs for part in pair]))


def _check_alike(own: Any, other: Any, where: str) -> None:
    """Refuse attentions that would compute something else with the same heads."""
    one, two = plain_attributes(own), plain_attributes(other)
    wrong = [k for k in {**one, **two} if k not in _FREE and one.get(k) != two.get(k)]
    if wrong:
        key = wrong[0]
        raise PlanError(
            f"Heads cannot be grafted from {where}: the attentions differ in {key} "
            f"({two.get(key)!r} and {one.get(key)!r}). {_ADVICE}"
        )
    for name in _HEAD_NORMS:
        gains = [getattr(module, name, None) for module in (own, other)]
        if gains[0] is None:
            continue
        mine, theirs = (gain.weight.detach() for gain in gains if gain is not None)
        if not torch.equal(mine, theirs):
            raise PlanError(
                f"Heads cannot be grafted from {where}: every head of a layer passes one {name}, "
                "whose gains differ between the two. They stand behind a division by the head's "
                f"own norm, so no change of the projection makes up for them. {_ADVICE}"
            )


def _norm_between(
    taker: nn.Module, giver: nn.Module, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s and c, [width] fp64, with norm_giver(h) = s * norm_taker(h) + c for every h.

    Raises:
        PlanError: there are no such s and c.
    """
    name = next((name for name in _NORMS if hasattr(taker, name)), None)
    if name is None:
        raise PlanError(
            f"Heads cannot be grafted from {where}: no norm is known in front of the attention "
            f"(looked for {', '.join(_NORMS)}). {_ADVICE}"
        )
    mine: Any = getattr(taker, name)
    theirs: Any = getattr(giver, name)
    gain = mine.weight.detach().double()
    if bool((gain == 0).any()):
        raise PlanError(
            f"Heads cannot be grafted from {where}: the norm in front of the attention has gains "
            f"of zero, which hide what the heads read. {_ADVICE}"
        )
    scale = theirs.weight.detach().double() / gain
    shift = torch.zeros_like(scale)
    if getattr(mine, "bias", None) is not None:
        shift = theirs.bias.detach().double() - scale * mine.bias.detach().double()
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_NUM_PROBES, len(gain), generator=generator).to(mine.weight)
    with torch.no_grad():
        expected, made = theirs(probe).double(), mine(probe).double() * scale + shift
    allowed = 8 * torch.finfo(mine.weight.dtype).eps * float(expected.abs().max() + 1)
    if float((expected - made).abs().max()) > allowed:
        raise PlanError(
            f"Heads cannot be grafted from {where}: the norms in front of the attentions differ by "
            f"more than gain and bias. {_ADVICE}"
        )
    return scale, shift
