"""make_plan: from scores to a plan, by a named rule."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from interlace.errors import ConfigError, PlanError, unknown_name
from interlace.plan.parts import add_parts
from interlace.plan.protection import protected_layers, repair, resolve
from interlace.plan.rules import DEFAULT_RULE, USE_LOSS, Problem, check_use, find_rule
from interlace.plan.weights import weighted
from interlace.plan.widths import add_cuts, add_grafts, check_widths
from interlace.records import Plan, Provenance, Scores, TowerPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.config import PlanSettings
    from interlace.plan.protection import Protect
    from interlace.plan.rules import Choice, Loss
    from interlace.plan.widths import Fraction, Spread

# A tower of one layer has no neighbour to train and nothing left to compare.
MIN_LAYERS_LEFT = 2
_GROUPS = ("all", "text", "vision", "balanced")


def tower_names(
    scores: Scores, towers: Sequence[str] | str | None, amounts: Mapping[str, Any] | None
) -> list[str]:
    """Return the towers to plan.

    Args:
        scores: with all towers that were scored.
        towers: as of `make_plan`.
        amounts: what is given per tower, if anything is.

    Raises:
        ConfigError: no towers, or the two differ.
        PlanError: a tower was not scored.
    """
    if not (towers is None or isinstance(towers, Iterable)):
        raise ConfigError(
            f"towers={towers!r} cannot be used. Give a tower's name, or a list of them."
        )
    named = [towers] if isinstance(towers, str) else None if towers is None else list(towers)
    if amounts is not None:
        if named is not None and set(named) != set(amounts):
            raise ConfigError(
                f"towers={named} and the towers of the amounts to drop {sorted(amounts)} differ. "
                "Give one of the two, or the same towers in both."
            )
        named = list(amounts)
    if named is None:
        named = ["text"] if "text" in scores.towers else list(scores.towers)
    if not named:
        raise ConfigError("No tower to plan. Name at least one in towers or drop_fraction.")
    for name in named:
        if name not in scores.towers:
            raise PlanError(unknown_name("tower", name, scores.towers))
    return named


def _from_fraction(fraction: Any, tower: str, num_layers: int) -> int:
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real):
        raise ConfigError(f"drop_fraction must be a number in 0..1, got {fraction!r}.")
    fraction = float(fraction)
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(
            f"drop_fraction must be in 0..1, got {fraction!r}. 0.25 drops a quarter of the layers."
        )
    # Published as int(L * fraction), rounding error included: 100 layers * 0.29 give 28.
    count = int(num_layers * fraction)
    if count == 0:
        raise PlanError(
            f"drop_fraction={fraction:g} of the {num_layers} layers of the tower '{tower}' is "
            f"{num_layers * fraction:.2f}, which rounds down to none. The smallest fraction that "
            f"drops a layer is {math.ceil(1e4 / num_layers) / 1e4:g}; or leave the tower out."
        )
    return count


def _from_number(number: Any, tower: str) -> int:
    try:
        count = -1 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        count = -1
    if count < 1:
        raise ConfigError(
            f"num_drop must be a whole number of at least 1, got {number!r} for tower '{tower}'."
        )
    return count


def _how_many(
    drop_fraction: Any, num_drop: Any, tower: str, num_layers: int, protected: Mapping[int, str]
) -> int:
    amount = drop_fraction if num_drop is None else num_drop
    amount = amount[tower] if isinstance(amount, Mapping) else amount
    if num_drop is None:
        count, given = _from_fraction(amount, tower, num_layers), f"drop_fraction={amount:g}"
    else:
        count = _from_number(amount, tower)
        given = f"num_drop={count}"
    left = num_layers - count
    if left < MIN_LAYERS_LEFT:
        raise PlanError(
            f"{given} leaves {max(left, 0)} of the {num_layers} layers of the tower '{tower}', "
            f"but at least {MIN_LAYERS_LEFT} must stay. Drop at most "
            f"{max(num_layers - MIN_LAYERS_LEFT, 0)}."
        )
    free = num_layers - len(protected)
    if count > free:
        raise PlanError(
            f"{given} drops {count} of the {num_layers} layers of the tower '{tower}', but "
            f"{len(protected)} are protected {sorted(protected)}, so only {free} may go. "
            "Drop fewer layers or protect fewer."
        )
    return count


def _tower_plan(problem: Problem, choice: Choice) -> TowerPlan:
    table = choice.layer_scores
    if table is None:
        scored = problem.weighted is not None or problem.scores.has_pack(1, problem.group)
        table = problem.score_table() if scored else (None,) * problem.num_layers
    reasons = dict(choice.reasons)
    for layer, why in problem.protected.items():
        note = f"protected: {why}"
        reasons[layer] = f"{reasons[layer]}; {note}" if layer in reasons else note
    return TowerPlan(
        num_layers=problem.num_layers,
        drop=choice.drop,
        tune=choice.tune,
        freeze=choice.freeze,
        layer_scores=table,
        reasons=dict(sorted(reasons.items())),
        parts=choice.parts,
    )


def arguments_of(settings: PlanSettings) -> dict[str, Any]:
    """Return settings as arguments of `make_plan`, without those of `split_plan` alone."""
    others = ("parameters", "fixed_time")
    return {name: value for name, value in vars(settings).items() if name not in others}


def make_plan(
    scores: Scores,
    *,
    drop_fraction: float | Mapping[str, float] | None = None,
    num_drop: int | Mapping[str, int] | None = None,
    rule: str = DEFAULT_RULE,
    protect: Protect = (),
    seed: int = 42,
    weights: Mapping[str, float] | None = None,
    towers: Sequence[str] | str | None = None,
    loss: Loss | None = None,
    group: str = "all",
    heads: Fraction = None,
    ffn: Fraction = None,
    spread: Spread = "uniform",
    width_metrics: Mapping[str, str] | None = None,
    graft: float | None = None,
    attention_parts: Fraction = None,
    ffn_parts: Fraction = None,
    standard: bool | None = None,
) -> Plan:
    """Choose the layers to drop, tune and freeze, and what the others lose of their width.

    Args:
        scores: what was measured.
        drop_fraction: share of a tower's layers to drop, 0..1, or a dict of them per tower. The
            number is int(L * fraction), as published.
        num_drop: the number itself, or a dict per tower, instead of a fraction.
        rule: name of the rule; see `rule_names()`. Another than the default needs layers to drop,
            as `weights` and `group` do.
        protect: layers never to drop: numbers (for every planned tower), a dict of them per tower,
            "auto" (what the scores recorded as pinned), "alignment" (these and the layers that
            carry the alignment of image and text; needs the metric "alignment"), or () for the
            exact published rule. They may still be tuned or be anchors. With any protection, a
            choice that the model's configuration could not express (cross-attention in every f-th
            layer) is replaced by the best one that it can, and `consecutive` looks only at blocks
            that fit.
        seed: seed of the rules that draw.
        weights: metric -> weight of at least 0: judge by the weighted sum of the metrics' z-scores
            instead of the similarity alone. Every metric counts as importance, high = keep; the
            sign of "similarity" (s_1) is turned. A triplet or pair is worth its z-scored s_3 or
            s_2 less the importance, by the other metrics, of the layer that it drops. Rules that
            choose by such scores take them: interlace, interlace_oa, interlace_tn, consecutive,
            triplet_optimal, shortgpt, and compensated for which layers it tries.
        towers: towers to plan. Default: those of the dict given, else the text tower where there
            is one, else all that were scored.
        loss: callback (tower, dropped layers in selection order) -> loss of the model without
            them; for the rules `sleb`, `compensated` and `compensated_parts`. The last calls it
            with a third argument, parts: place in a layer -> layers that lose it.
            `interlace.layer_loss` makes one.
        group: token group of the similarity: "all" (published), "text", "vision", or "balanced",
            where image and text tokens have equal mass; for rules that look at the similarity.
        heads: share of the query heads of every kept layer to cut, 0..1, or a dict per tower. They
            go in whole KV groups, rounded down.
        ffn: share of the neurons of every kept layer to cut, likewise, in multiples of 8. With
            `heads` or `ffn`, no layers need be dropped; the layers that lose something are then
            the ones to tune.
        spread: how the shares are spread over the layers: "uniform", the same in each; "global",
            whichever groups and neurons of all layers matter least; "ragged", single query heads.
        width_metrics: "heads" or "ffn" -> the metric to judge by, "random" for a draw. Default:
            the gates that `Scores.with_gates` put in ("head_gate", "ffn_gate"), else what was
            scored: "head_obs" before "head_norm" before "head_taylor", "ffn_obs" before "ffn_norm".
        graft: share of the KV groups of every dropped layer, the most important ones, that move
            into its tuned neighbour and work there in parallel; rounded down.
        attention_parts: share of the kept layers, 0..1, or a dict per tower, that lose their
            self-attention whole: those with the least "attention_relevance", which must be scored.
            Rounded down; protected layers keep it. Layers need not be dropped, as with `heads`.
        ffn_parts: the same for the feed-forward part, by "mlp_relevance".
        standard: refuse when pruning what plain transformers could not load. Default: with the
            uniform spread, no grafting and no parts taken out.

    Returns:
        The plan; `print(plan)` shows it.

    Raises:
        ConfigError: an unknown rule, or an argument that cannot be used or that nothing would
            come of.
        PlanError: no plan exists: too few layers, too many protected, packs or metrics not scored,
            weights for a rule that has no use for them, or the published rule fails here.
    """
    if not isinstance(scores, Scores):
        raise ConfigError(
            f"make_plan needs Scores, got {type(scores).__name__}. Use what score() returned, "
            "Scores.load(path), or Scores.from_similarity(...)."
        )
    try:
        seed = operator.index(seed)
    except TypeError:
        # None would draw other layers each time
        raise ConfigError(f"seed is {seed!r}; give a whole number.") from None
    choose = find_rule(rule)
    shares = [x for x in (heads, ffn, attention_parts, ffn_parts) if x is not None]
    if (drop_fraction is None) == (num_drop is None) and not (shares and num_drop is None):
        raise ConfigError(
            "Give either drop_fraction (such as 0.25) or num_drop (such as 9), and not both; got "
            f"drop_fraction={drop_fraction!r} and num_drop={num_drop!r}."
        )
    drops = drop_fraction is not None or num_drop is not None
    check_widths(
        heads=heads,
        ffn=ffn,
        spread=spread,
        metrics=width_metrics or {},
        graft=graft,
        drops=drops,
    )
    if group not in _GROUPS:
        raise ConfigError(unknown_name("token group", group, _GROUPS))
    check_use(rule, weights, group, drops=drops)
    if loss is not None and not callable(loss):
        raise ConfigError(
            f"loss is a {type(loss).__name__}; give a callback (tower, dropped_layers) -> loss, "
            "such as interlace.layer_loss(vlm, calibration, rule) makes."
        )
    if loss is not None and rule not in USE_LOSS:
        raise ConfigError(
            f"The rule '{rule}' asks for no loss. Leave loss out, or use one of "
            f"{', '.join(sorted(USE_LOSS))}."
        )
    amounts = drop_fraction if num_drop is None else num_drop
    named = [share for share in shares if isinstance(share, Mapping)]
    if amounts is None and towers is None and named:
        towers = list(dict.fromkeys(name for share in named for name in share))
    names = tower_names(scores, towers, amounts if isinstance(amounts, Mapping) else None)
    left_out = [name for share in named for name in share if name not in names]
    if towers is not None and left_out:
        raise ConfigError(
            f"towers={names} leaves out '{left_out[0]}', which is to lose a share of what is "
            "within its layers. Name it in towers too, or leave it out of the shares."
        )
    guards = resolve(protect, scores)
    planned: dict[str, TowerPlan] = {}
    for name in names:
        tower = scores[name]
        protected, guarded = protected_layers(guards, scores, name)
        if amounts is None:
            planned[name] = TowerPlan(tower.num_layers)
            continue
        count = _how_many(drop_fraction, num_drop, name, tower.num_layers, protected)
        problem = Problem(
            tower=name,
            scores=tower,
            num_drop=count,
            protected=protected,
            guarded=guarded,
            group=group,
            seed=seed,
            weighted=None if weights is None else weighted(tower, weights, group, name),
            loss=loss,
            shape=None if scores.shape is None else scores.shape.towers.get(name),
        )
        choice = choose(problem)
        planned[name] = _tower_plan(problem, repair(problem, choice) if guarded else choice)
    parts = {"attention_parts": attention_parts, "ffn_parts": ffn_parts}
    chosen = {name for plan in planned.values() for name in plan.parts}
    if chosen and any(share is not None for share in parts.values()):
        raise ConfigError(
            f"The rule '{rule}' chooses itself which layers lose {', '.join(sorted(chosen))}. "
            "Leave attention_parts and ffn_parts out, or take another rule."
        )
    planned = add_parts(planned, scores, parts, guards)
    narrowing = heads is not None or ffn is not None
    if narrowing:
        planned = add_cuts(
            planned,
            scores,
            heads=heads,
            ffn=ffn,
            spread=spread,
            metrics=width_metrics or {},
            seed=seed,
        )
    alike = graft is None and (not narrowing or spread == "uniform")
    alike = alike and not any(plan.parts for plan in planned.values())
    if graft is not None:
        planned = add_grafts(planned, scores, graft, (width_metrics or {}).get("heads"), seed)
    inputs = {"scores": scores.fingerprint}
    inputs |= {key: scores.inputs[key] for key in ("model", "data") if key in scores.inputs}
    return Plan(
        towers=planned,
        rule=rule if amounts is not None else "within layers",
        seed=seed,
        model_name=scores.model_name,
        shape=scores.shape,
        settings={
            "drop_fraction": drop_fraction,
            "num_drop": num_drop,
            "protect": guards,
            "weights": weights,
            "group": group,
            "heads": heads,
            "ffn": ffn,
            "spread": spread,
            "width_metrics": width_metrics,
            "graft": graft,
            "attention_parts": attention_parts,
            "ffn_parts": ffn_parts,
        },
        standard=alike if standard is None else standard,
        inputs=inputs,
        provenance=Provenance.collect(seed),
    )
