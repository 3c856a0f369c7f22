"""What a metric is, and the list of them.

A metric is one file beside this one that holds one class, named in `METRICS`: a `Meter`, which
watches hidden states as they pass; a `Probe` (probes.py), which runs the model in its own ways for
the sake of its loss; or `TaskRelevance`, which calls back.

Legend: N tokens of one run of a tower (padding included), D width, U units of a run, L layers;
h_0 is the input of layer 0, h_L the output of the last layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import ConfigError, ShapeError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

# Metric name -> "module:class". Adding a metric is adding its file and its line here.
METRICS: dict[str, str] = {
    "similarity": "interlace.scores.similarity:Similarity",
    "alignment": "interlace.scores.alignment:Alignment",
    "sensitivity": "interlace.scores.sensitivity:Sensitivity",
    "sensitivity_zeroth_order": "interlace.scores.zeroth_order:ZerothOrderSensitivity",
    "relevance": "interlace.scores.relevance:Relevance",
    "attention_relevance": "interlace.scores.relevance:AttentionRelevance",
    "mlp_relevance": "interlace.scores.relevance:MlpRelevance",
    "task_relevance": "interlace.scores.task:TaskRelevance",
}
# The same of single heads and neurons; see widths.py, and obs.py for those that go in turn.
WIDTH_METRICS: dict[str, str] = {
    "head_norm": "interlace.scores.head_norm:HeadNorm",
    "head_taylor": "interlace.scores.head_taylor:HeadTaylor",
    "head_obs": "interlace.scores.obs:HeadObs",
    "ffn_norm": "interlace.scores.ffn_norm:FfnNorm",
    "ffn_obs": "interlace.scores.obs:FfnObs",
}

TEXT, VISION = 0, 1
NUM_MODALITIES = 2
# Token groups of the published tables: of all counted tokens, and of each modality by itself.
GROUPS = ("all", "text", "vision")


@dataclass(frozen=True)
class Units:
    """Which unit and which modality every token of one run of a tower belongs to.

    A unit is what is averaged over before the mean over units is taken: a sample for text, an
    image for a vision tower. All tokens of a unit pass in one run.

    Attributes:
        unit: [N] int64, 0..num_units-1, or -1 for tokens that do not count (padding).
        modality: [N] int64, 0 text or 1 vision; anything where the token does not count.
        num_units: U.
    """

    unit: torch.Tensor
    modality: torch.Tensor
    num_units: int

    @property
    def num_seen(self) -> int:
        """Number of units that have tokens which count."""
        return len(set(self.unit.tolist()) - {-1})

    @property
    def num_bins(self) -> int:
        """Number of (unit, modality) bins."""
        return self.num_units * NUM_MODALITIES

    def bins(self) -> torch.Tensor:
        """Return the bin of every token, [N] int64 in 0..num_bins; the last takes the rest."""
        own = self.unit * NUM_MODALITIES + self.modality
        return own.masked_fill(self.unit < 0, self.num_bins)


@dataclass(frozen=True)
class NotFinite:
    """The first place of a batch where activations are NaN or infinite.

    Attributes:
        state: number of the hidden state, 0..L.
        unit: the unit, counted over all runs of the batch.
        num_units: number of units in all runs of the batch.
    """

    state: int
    unit: int
    num_units: int


class Summed(ABC):
    """What keeps sums over data, to which those of other processes are added."""

    @abstractmethod
    def sums(self) -> Sequence[torch.Tensor]:
        """Return the sums themselves, fp64 on the CPU, always in the same order."""

    def totals(self) -> torch.Tensor:
        """Return all sums as one flat fp64 tensor; those of two processes add up."""
        return torch.cat([each.flatten() for each in self.sums()])

    def load_totals(self, totals: torch.Tensor) -> None:
        """Replace the sums by `totals`, in the form that `totals` gives.

        Raises:
            ShapeError: they are of other metrics, towers or packs.
        """
        sums = self.sums()
        sizes = [each.numel() for each in sums]
        if totals.numel() != sum(sizes):
            raise ShapeError(
                f"{totals.numel()} sums do not fit a {type(self).__name__} with {sum(sizes)}. Add "
                "up those of the same metrics, towers and packs."
            )
        for own, new in zip(sums, torch.split(totals, sizes), strict=True):
            own.copy_(new.view_as(own))


class Meter(Summed):
    """Measures one tower while its hidden states pass by, and keeps sums that add up.

    Order of calls, for every batch: `start`; for every run of the tower `begin_run`, `state` with
    0, 1, ..., L in turn, `end_run`; then `finish`. A tower may run several times per batch.
    """

    def __init__(self, num_layers: int, packs: Sequence[int], *, whole: bool) -> None:
        """Make an empty meter.

        Args:
            num_layers: L.
            packs: the offsets p asked for, each in 1..L-1.
            whole: every offset was asked for, so the full matrix is wanted.
        """
        self.num_layers = num_layers
        self.packs = tuple(sorted(packs))
        self.whole = whole

    @abstractmethod
    def start(self) -> None:
        """Begin a batch; what a batch that broke off left behind is thrown away."""

    @abstractmethod
    def begin_run(self, units: Units) -> None:
        """Begin a run of the tower over tokens that belong to `units`."""

    @abstractmethod
    def state(self, index: int, hidden: torch.Tensor) -> None:
        """Take h_index, [N, D]."""

    @abstractmethod
    def end_run(self) -> None:
        """Take note that all states of the run have passed; let go of all of them."""

    @abstractmethod
    def finish(self) -> NotFinite | None:
        """End the batch and add it to the totals, or say where it is not finite and add nothing."""

    @abstractmethod
    def results(self) -> dict[str, Any]:
        """Return fields of `TowerScores`; per-layer values of other metrics under "metrics"."""


def named(argument: str, names: Any, example: str) -> tuple[str, ...]:
    """Read an argument that is one name or several.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(names, str):
        return (names,)
    given = tuple(names) if isinstance(names, Iterable) else (names,)
    if not all(isinstance(name, str) for name in given):
        raise ConfigError(f"{argument} is {names!r}; give names, such as ({example!r},).")
    return given


def metric_classes(names: Sequence[str]) -> dict[str, type]:
    """Load the classes of the named metrics.

    Raises:
        ConfigError: an unknown metric, none at all, or something else than names.
    """
    known = METRICS | WIDTH_METRICS
    names = named("metrics", names, "similarity")
    if not names:
        raise ConfigError(f"No metric was asked for. Give some of {', '.join(known)}.")
    classes: dict[str, type] = {}
    for name in names:
        if name not in known:
            raise ConfigError(unknown_name("metric", name, known))
        module, _, attribute = known[name].partition(":")
        classes[name] = getattr(import_module(module), attribute)
    return classes
