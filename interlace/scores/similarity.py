"""Cosine similarity between hidden states of one tower, streamed: few states are held at a time.

Legend: N tokens of a run (padding included), D width, S = L + 1 hidden states, U units of a run,
G = 2U bins of (unit, modality), P packs.

Source: INTERLACE (arXiv 2511.19676): s_p(i) = mean over samples of the mean over all tokens of a
sample of cos(h_i, h_{i+p}).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import ShapeError
from interlace.ops.layer_similarity import EPS, layer_similarity
from interlace.scores.metrics import GROUPS, NUM_MODALITIES, TEXT, VISION, Meter, NotFinite, Units

if TYPE_CHECKING:
    from collections.abc import Sequence

# Elements of a block of tokens that is worked on at once. A wide product never exists as a whole:
# on the CPU a block and its product stay in the second-level cache; on a GPU it bounds the extra
# memory to 64 MiB.
_BLOCK_CPU = 1 << 18
_BLOCK_GPU = 1 << 24


@dataclass
class _Held:
    """A state that later ones are still to be compared with.

    Attributes:
        state: [N, D].
        norm: [N], at least `EPS`; empty where the op computes it.
        version: torch's count of writes into the state, when it came.
    """

    state: torch.Tensor
    norm: torch.Tensor
    version: int


@dataclass
class _Run:
    """Sums of one run of the tower, by bin; the last bin takes the tokens that do not count.

    Attributes:
        num_units: U.
        bins: [N] int64, the bin of every token.
        sums: [G + 1, S, 1 + P] fp64, of the cosines of a state with the one `offset` before it.
            Column 0 is 0 where the state is finite and NaN where it is not.
        counts: [G + 1] fp64, tokens.
    """

    num_units: int
    bins: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor


class Similarity(Meter):
    """Mean cosines of h_i and h_{i+p}, per group of tokens.

    Memory beyond the model's own: max(packs) + 1 hidden states, the newest included. The full
    matrix compares every state with every other, so it holds all of them until the run ends.

    A band is done row by row as states arrive: with the norms kept, a new state costs one dot
    product per pack, while the op `layer_similarity` on the window of held states would take every
    pair of them again. The full matrix needs all pairs, so there the op is used.
    """

    def __init__(self, num_layers: int, packs: Sequence[int], *, whole: bool) -> None:
        """Make empty sums; see `Meter`."""
        super().__init__(num_layers, packs, whole=whole)
        # The pair (h_0, h_L) belongs to pack L, which has a tail only.
        self._offsets = (*self.packs, num_layers) if whole else self.packs
        num_states = num_layers + 1
        self._means = torch.zeros(len(GROUPS), num_states, len(self._offsets), dtype=torch.float64)
        self._samples = torch.zeros(len(GROUPS), dtype=torch.float64)
        self._tokens = torch.zeros(len(GROUPS), dtype=torch.float64)
        held = num_states if whole else max(self.packs, default=0)
        self._held: deque[_Held] = deque(maxlen=held)
        self._run: _Run | None = None
        self._runs: list[_Run] = []

    def start(self) -> None:
        """Begin a batch; see `Meter`."""
        self._held.clear()
        self._run = None
        self._runs = []

    def begin_run(self, units: Units) -> None:
        """Begin a run; see `Meter`."""
        bins = units.bins()
        shape = (units.num_bins + 1, self.num_layers + 1, 1 + len(self._offsets))
        self._run = _Run(
            num_units=units.num_units,
            bins=bins,
            sums=torch.zeros(shape, dtype=torch.float64, device=bins.device),
            counts=torch.bincount(bins, minlength=units.num_bins + 1).double(),
        )

    def state(self, index: int, hidden: torch.Tensor) -> None:
        """Compare h_index with the states before it that are wanted; see `Meter`."""
        if self._run is None:
            raise ShapeError("A hidden state came outside of a run; call begin_run first.")
        if self.whole:
            self._hold(hidden, torch.empty(0))
            return
        offsets = [offset for offset in self._offsets if offset <= index]
        earlier = [self._checked(-offset) for offset in offsets]
        products = _row_products(hidden, [each.state for each in earlier])
        norm = products[0].sqrt().clamp_min_(EPS)
        if earlier:
            products[1:] /= norm
            products[1:] /= torch.stack([each.norm.to(norm) for each in earlier])
        self._hold(hidden, norm)
        # Not finite times zero is NaN, finite times zero is zero: the column marks bad states.
        products[0] *= 0
        # Offsets ascend, so those that exist yet are the first columns.
        sums = self._run.sums[:, index, : len(products)]
        sums.index_add_(0, self._run.bins, products.T.to(sums))

    def end_run(self) -> None:
        """Close a run; see `Meter`."""
        if self._run is None:
            return
        if self.whole:
            self._whole_matrix(self._run)
        self._held.clear()
        self._runs.append(self._run)
        self._run = None

    def finish(self) -> NotFinite | None:
        """Turn the sums of the batch into means per unit and add those up; see `Meter`."""
        self._held.clear()
        num_units = sum(run.num_units for run in self._runs)
        sums = torch.cat([run.sums[:-1].cpu() for run in self._runs])
        counts = torch.cat([run.counts[:-1].cpu() for run in self._runs])
        self._runs = []
        bad = sums[:, :, 0].isnan().nonzero().tolist()
        if bad:
            state, bin_index = min((state, bin_index) for bin_index, state in bad)
            return NotFinite(state, bin_index // NUM_MODALITIES, num_units)
        cosines = sums[:, :, 1:].reshape(num_units, NUM_MODALITIES, *sums[0, :, 1:].shape)
        tokens = counts.view(num_units, NUM_MODALITIES)
        by_group = {
            "all": (cosines.sum(1), tokens.sum(1)),
            "text": (cosines[:, TEXT], tokens[:, TEXT]),
            "vision": (cosines[:, VISION], tokens[:, VISION]),
        }
        for row, group in enumerate(GROUPS):
            total, count = by_group[group]
            present = count > 0
            self._means[row] += (total[present] / count[present, None, None]).sum(0)
            self._samples[row] += present.sum()
            self._tokens[row] += count.sum()
        return None

    def sums(self) -> Sequence[torch.Tensor]:
        """Return the sums; see `Meter`."""
        return self._means, self._samples, self._tokens

    def results(self) -> dict[str, Any]:
        """Return the fields similarity, tail, num_samples, num_tokens and group_samples."""
        similarity: dict[str, dict[int, tuple[float, ...]]] = {}
        tail: dict[str, dict[int, float]] = {}
        groups = [row for row in range(len(GROUPS)) if self._samples[row] > 0]
        for row in groups:
            means = self._means[row] / self._samples[row]
            # Column: pack; row of `means`: the later state of the pair.
            tables = dict(zip(self._offsets, means.T.tolist(), strict=True))
            similarity[GROUPS[row]] = {p: tuple(tables[p][p:-1]) for p in self.packs}
            tail[GROUPS[row]] = {p: values[-1] for p, values in tables.items()}
        return {
            "similarity": similarity,
            "tail": tail,
            "num_samples": int(self._samples[0]),
            "num_tokens": {GROUPS[row]: int(self._tokens[row]) for row in groups},
            "group_samples": {GROUPS[row]: int(self._samples[row]) for row in groups},
        }

    def _hold(self, state: torch.Tensor, norm: torch.Tensor) -> None:
        self._held.append(_Held(state, norm, state._version))

    def _checked(self, position: int) -> _Held:
        held = self._held[position]
        if held.state._version != held.version:
            raise ShapeError(
                "A layer wrote into the hidden states it was given, so they cannot be compared "
                "with later ones. Towers that work in place cannot be scored."
            )
        return held

    def _whole_matrix(self, run: _Run) -> None:
        states = [self._checked(position).state for position in range(len(self._held))]
        num_bins = run.sums.shape[0] - 1
        groups = run.bins.masked_fill(run.bins == num_bins, -1).to(torch.int32)
        # A model spread over several devices: the states meet where its tokens were described.
        matrix, _ = layer_similarity(
            [state.to(groups.device) for state in states], groups, num_groups=num_bins
        )
        matrix = matrix.to(run.sums)
        for column, offset in enumerate(self._offsets, start=1):
            run.sums[:-1, offset:, column] += matrix.diagonal(offset, dim1=1, dim2=2)
        run.sums[:-1, :, 0] += matrix.diagonal(dim1=1, dim2=2) * 0


def _row_products(state: torch.Tensor, earlier: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the dot products of every token with itself and with itself in earlier states.

    Args:
        state: [N, D].
        earlier: states [N, D].

    Returns:
        [1 + len(earlier), N], multiplied and added up in fp32 (fp64 for fp64 states).
    """
    wide = torch.float64 if state.dtype == torch.float64 else torch.float32
    num_tokens, width = state.shape
    out = torch.empty(1 + len(earlier), num_tokens, dtype=wide, device=state.device)
    block = _BLOCK_GPU if state.is_cuda else _BLOCK_CPU
    rows = max(1, block // max(1, width))
    for first in range(0, num_tokens, rows):
        part = slice(first, first + rows)
        own = state[part].to(wide)
        torch.sum(own * own, dim=-1, out=out[0, part])
        for row, each in enumerate(earlier, start=1):
            torch.sum(own * each[part].to(own), dim=-1, out=out[row, part])
    return out
