"""The names of the bridges, and which one every pruned tower gets. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from interlace.config import DEFAULT_RANK
from interlace.errors import ConfigError, check_numbers, unknown_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from interlace.records import Plan

NONE, FOLD, REFIT = "none", "fold", "refit"
# Those that can also stand in for heads, neurons and parts that kept layers lose.
WITHIN_LAYERS = (FOLD, REFIT)
# Those that are modules at the cuts; the others end in the weights.
RUN_TIME = ("diagonal", "lowrank")
BRIDGES = (NONE, "scale", FOLD, REFIT, *RUN_TIME)
EVEN, FISHER = "even", "fisher"
# By what the tokens count in a fit.
TOKEN_WEIGHTS = (EVEN, FISHER)
# How many samples bridges are fitted on where nobody says another number.
BRIDGE_SAMPLES = 512


def check_bridges(bridges: Any) -> None:
    """Check a choice of bridges before anything is opened.

    Args:
        bridges: a name, or tower name -> name.

    Raises:
        ConfigError: an unknown name, or neither of the two.
    """
    names = bridges.values() if isinstance(bridges, Mapping) else [bridges]
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(
                f"bridges is {bridges!r}; give one of {', '.join(BRIDGES)}, or one per tower such "
                "as {'text': 'fold'}."
            )
        if name not in BRIDGES:
            raise ConfigError(unknown_name("bridge", name, BRIDGES))


def has_bridges(bridges: str | Mapping[str, str], but: Collection[str] = ()) -> bool:
    """Tell whether a choice of bridges asks for any, or for any but some."""
    names = bridges.values() if isinstance(bridges, Mapping) else [bridges]
    return any(name != NONE and name not in but for name in names)


def check_token_weights(name: Any, bridges: str | Mapping[str, str]) -> None:
    """Check a choice of token weights, beside a choice of bridges.

    Raises:
        ConfigError: an unknown name, or nothing is fitted.
    """
    if name not in TOKEN_WEIGHTS:
        raise ConfigError(unknown_name("kind of token weights", name, TOKEN_WEIGHTS))
    if name != EVEN and not has_bridges(bridges):
        raise ConfigError(
            f"token_weights={name!r} says what counts in the fits of bridges, and "
            f"bridges={bridges!r} asks for none. Name a bridge, such as 'refit', or leave "
            "token_weights out."
        )


def check_rank(rank: int, bridges: str | Mapping[str, str]) -> None:
    """Check the rank of low-rank bridges, beside a choice of bridges.

    Raises:
        ConfigError: no integer above 0, or one of the caller's that no bridge has.
    """
    check_numbers(rank=rank)
    names = bridges.values() if isinstance(bridges, Mapping) else [bridges]
    if rank != DEFAULT_RANK and "lowrank" not in names:
        raise ConfigError(
            f"rank is {rank}, but bridges is {bridges!r}, and only 'lowrank' has a rank. Name "
            "that bridge, or leave rank out."
        )


def of_use(bridges: str | Mapping[str, str], plan: Plan) -> str | dict[str, str]:
    """Leave out the bridges of towers that lose nothing such a bridge can repair.

    Args:
        bridges: a name for all towers, or tower name -> name.
        plan: the plan, which need not cut every tower.
    """

    def serves(tower: str, bridge: str) -> bool:
        own = plan.towers.get(tower)
        return own is not None and bool(own.drop or (bridge in WITHIN_LAYERS and own.losing()))

    if isinstance(bridges, str):
        return bridges if any(serves(tower, bridges) for tower in plan.towers) else NONE
    return {tower: name for tower, name in bridges.items() if serves(tower, name)} or NONE


def bridges_by_tower(
    bridges: str | Mapping[str, str],
    shortened: Iterable[str],
    changed: Iterable[str],
    towers: Iterable[str],
) -> dict[str, str]:
    """Return the bridge of every pruned tower that gets one.

    Args:
        bridges: a name for all pruned towers, or tower name -> name; towers it leaves out get none.
        shortened: towers that lose layers, which all bridges can stand in for.
        changed: towers that lose anything, which those of `WITHIN_LAYERS` can stand in for.
        towers: all towers of the model.

    Raises:
        ConfigError: an unknown bridge or tower, or a bridge for a tower that it can do nothing for.
    """
    check_bridges(bridges)
    shortened, changed, towers = list(shortened), list(changed), list(towers)
    if isinstance(bridges, str):
        if has_bridges(bridges, but=WITHIN_LAYERS) and changed and not shortened:
            raise ConfigError(
                f"The bridge '{bridges}' stands in for removed layers, and this plan removes none. "
                f"Take one of {', '.join(WITHIN_LAYERS)}, which also repair narrower layers, or "
                f"'{NONE}'."
            )
        pruned = changed if bridges in WITHIN_LAYERS else shortened
        return {} if bridges == NONE else dict.fromkeys(pruned, bridges)
    for tower in bridges:
        if tower not in towers:
            raise ConfigError(unknown_name("tower", tower, towers))
    wanted = {tower: name for tower, name in bridges.items() if name != NONE}
    for tower, name in wanted.items():
        able = name in WITHIN_LAYERS
        pruned, lost = (changed, "nothing") if able else (shortened, "no layer")
        if tower not in pruned:
            raise ConfigError(
                f"bridges asks for '{name}' in the {tower} tower, which loses {lost} by this plan. "
                f"Towers that can have it: {', '.join(pruned) or 'none'}."
            )
    return wanted
