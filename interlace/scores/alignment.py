"""Alignment: where in a tower image and text states come together, and which layers carry that.

Legend: N tokens of a run, D width, U units of a run, L layers; t_i(u), v_i(u) mean of h_i over the
text and over the image tokens of unit u.

    alignment(i) = mean over samples u of |c_{i+1}(u) - c_i(u)|

Where image and text tokens pass through one tower,

    c_i(u) = cos(t_i(u), v_i(u))

Where each has a tower of its own, with widths of its own, two towers are compared at matched depth,
j = round(i L' / L), by how alike they order the samples of a batch:

    c_i(u) = correlation over w /= u of cos(a_i(u), a_i(w)) and cos(b_j(u), b_j(w))

with a the means in this tower and b those in the other. It takes one image per text and at least 4
samples in a batch, and depends on which samples stand in a batch together.

Source of the correlation: representational similarity analysis (Kriegeskorte et al. 2008).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from interlace.errors import ShapeError
from interlace.scores.metrics import NUM_MODALITIES, TEXT, VISION, Meter, NotFinite, Units

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.models.handle import VLM, Tower

# Samples of a batch from which on a correlation over the others says something.
_FEWEST = 4

_READERS = {
    "chat": "the projector",
    "contrastive": "the projection into the shared space",
    "caption": "the text decoder",
    "vqa": "the text encoder",
}


def meeting_layers(vlm: VLM, tower: Tower) -> dict[int, str]:
    """Name the layers of a tower at which the modalities meet: position -> reason in words.

    They are those that other parts read from or write to by number (DeepStack sources and targets,
    `vision_feature_layer`), and those whose output enters a projector: the last layer of the vision
    tower and of a Q-Former, and the last of a contrastive model's text tower.
    """
    bound = {tower.position(layer): reason for layer, reason in tower.bound.items()}
    found = vlm.family.advised(vlm.model, tower.name) | bound
    last = tower.num_layers - 1
    reader = _READERS[vlm.family.objective]
    if tower.name == "qformer":
        reader = "the projection into the language model"
    elif tower.name == "vision" and "qformer" in vlm.towers:
        reader = "the Q-Former"
    ends = tower.name in ("vision", "qformer")
    ends = ends or (tower.name == "text" and vlm.family.objective == "contrastive")
    unread = {tower.position(layer) for layer in tower.unread}
    if ends and last not in unread and last not in found:
        found[last] = f"its output enters {reader}"
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Seen:
    """What is known of one run when it ends.

    Attributes:
        cosines: [L + 1, U], of text and image means.
        both: [U] bool, the unit has tokens of both kinds.
        likeness: [L + 1, U, U], cosines between the means of units (of text where there is any).
        num_tokens: counted tokens.
    """

    cosines: Tensor
    both: Tensor
    likeness: Tensor
    num_tokens: int


class Alignment(Meter):
    """Change of the likeness of image and text states, per layer.

    It watches the pass of `similarity` and costs none of its own. Memory: the means of a state, and
    for every state of a batch U numbers and U x U.
    """

    def __init__(self, num_layers: int, packs: Sequence[int], *, whole: bool) -> None:
        """Make empty sums; see `Meter`. Packs mean nothing here."""
        super().__init__(num_layers, packs, whole=whole)
        self._changes = torch.zeros(num_layers, dtype=torch.float64)
        # samples behind the changes, units, tokens
        self._counts = torch.zeros(3, dtype=torch.float64)
        self._units: Units | None = None
        self._cosines: list[Tensor] = []
        self._likeness: list[Tensor] = []
        self._runs: list[_Seen] = []

    def start(self) -> None:
        """Begin a batch; see `Meter`."""
        self._units, self._runs = None, []

    def begin_run(self, units: Units) -> None:
        """Begin a run; see `Meter`."""
        self._units, self._cosines, self._likeness = units, [], []
        self._bins = units.bins()
        counts = torch.bincount(self._bins, minlength=units.num_bins + 1)[:-1]
        self._tokens = counts.view(-1, NUM_MODALITIES)

    def state(self, index: int, hidden: Tensor) -> None:
        """Compare the means; see `Meter`."""
        units = self._units
        if units is None:
            raise ShapeError("A hidden state came outside of a run; call begin_run first.")
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        sums = wide.new_zeros(units.num_bins + 1, hidden.shape[-1])
        # The direction of a mean is that of the sum.
        sums.index_add_(0, self._bins.to(hidden.device), wide)
        means = functional.normalize(sums[:-1].view(units.num_units, NUM_MODALITIES, -1), dim=-1)
        cosine = (means[:, TEXT] * means[:, VISION]).sum(-1)
        # Zero times what is not finite is NaN, which marks the bad units.
        marks = (sums[:-1] * 0).view(units.num_units, -1).sum(-1)
        own = means[:, TEXT if bool(self._tokens[:, TEXT].any()) else VISION]
        self._cosines.append((cosine + marks).double().cpu())
        self._likeness.append((own @ own.T).double().cpu())

    def end_run(self) -> None:
        """Close a run; see `Meter`."""
        if self._units is None:
            return
        seen = _Seen(
            cosines=torch.stack(self._cosines),
            both=(self._tokens > 0).all(1).cpu(),
            likeness=torch.stack(self._likeness),
            num_tokens=int(self._tokens.sum()),
        )
        self._runs.append(seen)
        self._units = None

    def finish(self) -> NotFinite | None:
        """End the batch; see `Meter`."""
        cosines = torch.cat([run.cosines for run in self._runs], dim=1)
        bad = cosines.isnan().nonzero().tolist()
        if bad:
            state, unit = min(map(tuple, bad))
            return NotFinite(state, unit, cosines.shape[1])
        both = torch.cat([run.both for run in self._runs])
        self._add(cosines[:, both])
        self._counts[1] += len(both)
        self._counts[2] += sum(run.num_tokens for run in self._runs)
        return None

    def join(self, other: Alignment) -> None:
        """Compare with the tower of the other modality, once both have finished a batch.

        Nothing is compared where image and text meet inside of this tower, or where the units of
        the two are not the same samples.
        """
        if len(self._runs) != 1 or len(other._runs) != 1:
            return
        (own,), (others,) = self._runs, other._runs
        num_units = len(own.both)
        if bool(own.both.any()) or num_units != len(others.both) or num_units < _FEWEST:
            return
        last, other_last = len(own.likeness) - 1, len(others.likeness) - 1
        matched = [round(state * other_last / last) for state in range(last + 1)]
        self._add(_correlation(own.likeness, others.likeness[matched]))

    def _add(self, likeness: Tensor) -> None:
        self._changes += likeness.diff(dim=0).abs().sum(1)
        self._counts[0] += likeness.shape[1]

    def sums(self) -> Sequence[Tensor]:
        """Return the sums; see `Meter`."""
        return self._changes, self._counts

    def results(self) -> dict[str, Any]:
        """Return the fields metrics, group_samples, num_samples, num_tokens and notes."""
        num_compared, num_units, num_tokens = (int(count) for count in self._counts)
        fields: dict[str, Any] = {"num_samples": num_units, "num_tokens": {"all": num_tokens}}
        if num_compared:
            fields["metrics"] = {"alignment": tuple((self._changes / num_compared).tolist())}
            fields["group_samples"] = {"alignment": num_compared}
        else:
            fields["notes"] = (
                "no alignment values: no sample had image and text tokens in this tower, and no "
                f"batch of {_FEWEST} or more samples with one image each ran through this tower "
                "and a scored one of the other modality; only where towers meet is known",
            )
        return fields


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Correlate the rows of matrices [S, U, U] without their diagonals: [S, U]."""
    num_units = one.shape[1]
    off = ~torch.eye(num_units, dtype=torch.bool)
    rows = [each[:, off].view(-1, num_units, num_units - 1) for each in (one, other)]
    centred = [functional.normalize(each - each.mean(-1, keepdim=True), dim=-1) for each in rows]
    return (centred[0] * centred[1]).sum(-1)
