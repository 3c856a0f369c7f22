"""Alignment: where in a tower image and text states come together, and which layers carry that.

Legend: N tokens of a run, D width, U units of a run, L layers, m the modality (text, vision).

    c_i(u)       = cos(mean of h_i over the text tokens of u, mean of h_i over its image tokens)
    alignment(i) = mean over samples u of |c_{i+1}(u) - c_i(u)|

Only samples with tokens of both kinds count, so towers that read one modality have no such values;
what carries the alignment there is where the towers meet: see `meeting_layers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import ShapeError
from interlace.scores.metrics import NUM_MODALITIES, TEXT, VISION, Meter, NotFinite, Units

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interlace.models.handle import VLM, Tower

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


class Alignment(Meter):
    """Change of the cosine between mean text and mean image states, per layer.

    It watches the pass of `similarity` and costs none of its own. Memory: U means of width D and
    their cosines.
    """

    def __init__(self, num_layers: int, packs: Sequence[int], *, whole: bool) -> None:
        """Make empty sums; see `Meter`. Packs mean nothing here."""
        super().__init__(num_layers, packs, whole=whole)
        self._changes = torch.zeros(num_layers, dtype=torch.float64)
        self._counts = torch.zeros(3, dtype=torch.float64)
        self._units: Units | None = None
        self._bins = torch.empty(0, dtype=torch.int64)
        self._cosines: list[Tensor] = []
        self._runs: list[tuple[Tensor, Tensor, int]] = []

    def start(self) -> None:
        """Begin a batch; see `Meter`."""
        self._units, self._cosines, self._runs = None, [], []

    def begin_run(self, units: Units) -> None:
        """Begin a run; see `Meter`."""
        self._units, self._cosines = units, []
        self._bins = units.bins()

    def state(self, index: int, hidden: Tensor) -> None:
        """Take the cosine of the means; see `Meter`."""
        units = self._units
        if units is None:
            raise ShapeError("A hidden state came outside of a run; call begin_run first.")
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        sums = wide.new_zeros(units.num_bins + 1, hidden.shape[-1])
        # The direction of a mean is that of the sum.
        sums.index_add_(0, self._bins.to(hidden.device), wide)
        by_modality = sums[:-1].view(units.num_units, NUM_MODALITIES, -1)
        cosine = torch.cosine_similarity(by_modality[:, TEXT], by_modality[:, VISION], dim=-1)
        # A sum of finite numbers is finite but for states that are not, so NaN marks bad ones.
        finite = (by_modality * 0).sum((1, 2))
        self._cosines.append((cosine + finite).double().cpu())

    def end_run(self) -> None:
        """Close a run; see `Meter`."""
        if self._units is None:
            return
        counts = torch.bincount(self._bins, minlength=self._units.num_bins + 1)[:-1]
        both = (counts.view(-1, NUM_MODALITIES) > 0).all(1).cpu()
        self._runs.append((torch.stack(self._cosines), both, int(counts.sum())))
        self._units = None

    def finish(self) -> NotFinite | None:
        """End the batch; see `Meter`."""
        cosines = torch.cat([cosines for cosines, _, _ in self._runs], dim=1)
        both = torch.cat([both for _, both, _ in self._runs])
        bad = cosines.isnan().nonzero().tolist()
        if bad:
            state, unit = min(map(tuple, bad))
            return NotFinite(state, unit, cosines.shape[1])
        self._changes += cosines.diff(dim=0).abs()[:, both].sum(1)
        self._counts[0] += both.sum()
        self._counts[1] += len(both)
        self._counts[2] += sum(tokens for _, _, tokens in self._runs)
        self._runs = []
        return None

    def totals(self) -> Tensor:
        """Return the sums; see `Meter`."""
        return torch.cat([self._changes, self._counts])

    def load_totals(self, totals: Tensor) -> None:
        """Replace the sums; see `Meter`."""
        if totals.numel() != self.num_layers + 3:
            raise ShapeError(
                f"Sums of alignment with {totals.numel()} numbers do not fit a meter with "
                f"{self.num_layers + 3}: merge meters of the same tower."
            )
        self._changes.copy_(totals[: self.num_layers])
        self._counts.copy_(totals[self.num_layers :])

    def results(self) -> dict[str, Any]:
        """Return the fields metrics, group_samples, num_samples, num_tokens and notes."""
        num_both, num_units, num_tokens = (int(count) for count in self._counts)
        fields: dict[str, Any] = {"num_samples": num_units, "num_tokens": {"all": num_tokens}}
        if num_both:
            fields["metrics"] = {"alignment": tuple((self._changes / num_both).tolist())}
            fields["group_samples"] = {"alignment": num_both}
        else:
            fields["notes"] = (
                "no alignment values: image and text tokens do not meet in this tower, so only "
                "the layers at which it meets other towers are known to carry the alignment",
            )
        return fields
