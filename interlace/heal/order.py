"""The order of the samples: fixed by the seed alone, whatever the loader or a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.data.samples import Sample


class ShuffledRepeats(Dataset["Sample"]):
    """Samples in shuffled order, pass after pass, as one long data set.

    The trainer reads it front to back, so the place in it is all that a resumed run has to know.
    """

    def __init__(self, samples: Sequence[Sample], total: int, seed: int) -> None:
        """Lay out `total` samples; every pass over `samples` has an order of its own."""
        self._samples = samples
        self._total = total
        self._seed = seed
        self._pass = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        """Give the number of samples over all passes."""
        return self._total

    def __getitem__(self, index: int) -> Sample:
        """Give the sample at a place in the whole run."""
        number, place = divmod(index, len(self._samples))
        if number != self._pass:
            generator = torch.Generator().manual_seed(self._seed + number)
            self._order = torch.randperm(len(self._samples), generator=generator).tolist()
            self._pass = number
        return self._samples[self._order[place]]
