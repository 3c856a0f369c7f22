"""Gaps: the places of a tower where removed layers stood, one per run of adjacent ones.

Where kept layers are repaired too, there is one behind each of them, of no layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interlace.records import Bridge
from interlace.surgery.bridges.names import FOLD, NONE, REFIT

if TYPE_CHECKING:
    from interlace.surgery.cuts import Cut


@dataclass(frozen=True)
class Gap:
    """One run of adjacent removed layers, or the place behind a kept layer to be repaired.

    Attributes:
        tower: tower name.
        path: dotted path of the tower's layers, the same in both models.
        dropped: original numbers of the removed layers; none behind a layer to be repaired.
        after: original number of the kept layer before them; None where there is none.
        position: student position of the layer behind the gap; the student's depth where it is the
            end of the tower.
        goal: teacher position of the layer whose input the student's state should equal; the
            teacher's depth where it is the output of its last layer.
        ends: nothing reads what the layers behind the gap make of it, or there are none.
        narrowed: the kept layer before it lost heads, neurons or a part.
    """

    tower: str
    path: str
    dropped: tuple[int, ...]
    after: int | None
    position: int
    goal: int
    ends: bool = False
    narrowed: bool = False

    def __str__(self) -> str:
        """Name the place in messages and notes."""
        numbers = ", ".join(map(str, self.dropped or [self.after]))
        return f"{self.tower} layer{'s' if len(self.dropped) > 1 else ''} {numbers}"

    def bridge(self, kind: str = NONE, **found: Any) -> Bridge:
        """Return the record of what stands in here; `found` are its other fields."""
        return Bridge(self.tower, kind, self.dropped, self.after, **found)


def find_gaps(cut: Cut, bridge: str = NONE) -> tuple[list[Gap], list[tuple[int, ...]]]:
    """Find the gaps of a cut tower, front to back.

    Removed layers whose output nothing reads (above LLaVA's `vision_feature_layer`) are left out at
    the end of a run: what is read there is the state before them.

    Args:
        cut: of the tower.
        bridge: "fold" also has the places behind layers that lost heads, neurons or a part,
            "refit" those behind all kept layers from the first change of the tower on.

    Returns:
        The gaps, and the runs of unread layers that need no bridge (original numbers).
    """
    tower = cut.tower
    gaps, unread = [], []
    kept = (*cut.kept, tower.num_layers)
    lossy = cut.plan.losing()
    changed = False
    for position, behind in enumerate(kept):
        first = kept[position - 1] + 1 if position else 0
        read = behind
        while read > first and tower.original[read - 1] in tower.unread:
            read -= 1
        if read < behind:
            unread.append(tower.original[read:behind])
        after = tower.original[first - 1] if first else None
        changed = changed or behind > first or after in lossy or after in cut.plan.graft
        wanted = after in lossy if bridge == FOLD else bridge == REFIT and changed
        if read > first or (wanted and after is not None and after not in tower.unread):
            dropped = tower.original[first:read]
            ends = all(layer in tower.unread for layer in tower.original[read:])
            place = (tower.name, tower.path, dropped, after, position, read)
            gaps.append(Gap(*place, ends=ends, narrowed=after in lossy))
    return gaps, unread
