"""Importance of heads and neurons: a pass over the data that watches what output projections read.

Legend: N tokens of a run, C input columns of an output projection, U its units (heads or neurons),
S samples of a run.

A metric of this kind is one file beside this one with a subclass of `Gauge`, named in
`WIDTH_METRICS`. It turns the columns that a projection reads into a value per token and unit;
values are averaged over the tokens of a sample first, over samples then. Padding does not count.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from interlace._progress import track
from interlace._torch_utils import inference, without_cache
from interlace.errors import DataError, ShapeError
from interlace.models.handle import to_model
from interlace.models.predictor import check_gradients, for_states
from interlace.models.sites import find_sites
from interlace.models.states import hooked, watch_state
from interlace.scores.losses import SampleLoss
from interlace.scores.metrics import Summed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from interlace.models.handle import VLM, Tower
    from interlace.models.sites import Site
    from interlace.scores.batches import Batch, Batches
    from interlace.scores.metrics import Units

# Digits that are kept of a value; neurons are many, and ranks need no more.
_DIGITS = 6

Importance = dict[str, tuple[tuple[float, ...], ...]]


class Gauge(ABC):
    """Measures the units of one site of one layer.

    Attributes:
        kind: "heads" or "ffn", the sites it is for.
        gradient: it needs the gradients of the samples' losses (`SampleLoss`), so answers are fed
            and a backward pass is run.
    """

    kind: ClassVar[str]
    gradient: ClassVar[bool] = False

    def __init__(self, site: Site) -> None:
        """Make an empty gauge."""
        self.site = site
        self.total = torch.zeros(site.num_units, dtype=torch.float64)

    @abstractmethod
    def read(self, columns: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """Look at what the projection reads.

        Args:
            columns: [N, C].
            residual: norm of the hidden state of every token at the input of the layer, [N] fp32.

        Returns:
            [N, U], or None where the value is known only after the backward pass.
        """

    def add(self, values: torch.Tensor, units: Units) -> None:
        """Add the means over the tokens of every sample, of values [N, U]."""
        sums, counts = _per_sample(values, units)
        self.total += (sums / counts.clamp_min(1)[:, None]).sum(0)


def rounded(values: torch.Tensor) -> list[float]:
    """Return values as records keep them."""
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]


def _per_sample(values: torch.Tensor, units: Units) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of [N, U] over the tokens of every sample, [S, U] fp64, and their counts."""
    own = units.unit.to(values.device)
    if len(own) != len(values):
        raise ShapeError(
            f"A projection reads {len(values)} tokens, but its layer was given {len(own)}; the "
            "importance of its units cannot be told per sample."
        )
    own = own.masked_fill(own < 0, units.num_units)
    shape = (units.num_units + 1, values.shape[1])
    wide = torch.zeros(shape, dtype=torch.float64, device=values.device)
    wide.index_add_(0, own, values.double())
    counts = torch.bincount(own, minlength=units.num_units + 1).double()
    return wide[:-1].cpu(), counts[:-1].cpu()


class _Watch:
    """One tower with the gauges of one metric."""

    def __init__(self, tower: Tower, kind: type[Gauge]) -> None:
        self.tower = tower
        self.gauges: dict[tuple[str, int], Gauge] = {
            (name, position): kind(site)
            for position, layer in enumerate(tower.layers)
            for name, site in find_sites(layer).items()
            if site.kind == kind.kind and site.groups
        }
        self.samples = torch.zeros((), dtype=torch.float64)
        self.units: Units | None = None
        self.describe: Callable[[torch.Tensor], Units] | None = None
        self.residual = torch.empty(0)
        # factors of 1 before every projection in this batch, one per token and unit
        self.gates: list[tuple[Gauge, Units, torch.Tensor]] = []

    def hooks(self) -> Iterator[RemovableHandle]:
        """Set the hooks."""
        for position in range(self.tower.num_layers):
            take = partial(self._take, position)
            yield watch_state(self.tower.layers, position, self.tower.name, take)
        for gauge in self.gauges.values():
            yield gauge.site.output.register_forward_pre_hook(partial(self._read, gauge))

    def _take(self, position: int, hidden: torch.Tensor) -> None:
        if position == 0 and self.describe is not None:
            self.units = self.describe(hidden)
            self.samples += self.units.num_seen
        flat = hidden.detach().reshape(-1, hidden.shape[-1]).float()
        self.residual = flat.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)

    def _read(self, gauge: Gauge, _: Any, args: Any) -> Any:
        columns, units = args[0], self.units
        if units is None:
            return None
        if gauge.gradient:
            shape = (*columns.shape[:-1], gauge.site.num_units)
            gate = columns.new_ones(shape).requires_grad_()
            self.gates.append((gauge, units, gate))
            parts = columns.unflatten(-1, (gauge.site.num_units, gauge.site.head_dim))
            return ((parts * gate[..., None]).flatten(-2),)
        flat = columns.detach().reshape(-1, columns.shape[-1])
        values = gauge.read(flat, self.residual.to(flat.device))
        if values is not None:
            gauge.add(values, units)
        return None

    def results(self) -> Importance:
        names = dict.fromkeys(name for name, _ in self.gauges)
        made: Importance = {}
        for name in names:
            rows = [self.gauges.get((name, i)) for i in range(self.tower.num_layers)]
            made[name] = tuple(
                tuple(rounded(g.total / self.samples)) if g is not None else () for g in rows
            )
        return made


class Gauges(Summed):
    """Runs the data once for every metric of units, and keeps sums that add up over processes."""

    def __init__(
        self, vlm: VLM, towers: Sequence[Tower], classes: Mapping[str, type[Gauge]]
    ) -> None:
        """Make empty gauges for every site of the towers.

        Args:
            vlm: the model; left as it was.
            towers: the towers to watch.
            classes: metric name -> its gauge.
        """
        self._vlm = vlm
        self._classes = classes
        self._watches = {
            name: [_Watch(tower, kind) for tower in towers] for name, kind in classes.items()
        }

    def run(self, batches: Batches, rank: int, world: int, description: str) -> None:
        """Measure on this process's share of the data.

        Raises:
            ConfigError: a gradient is needed through weights that allow none.
            DataError: there is no loss where one is needed, or a value is not finite.
        """
        for name, kind in self._classes.items():
            if kind.gradient:
                check_gradients(self._vlm, f"'{name}' cannot be scored")
            loss = SampleLoss(self._vlm) if kind.gradient else None
            own = (batches.labelled() if kind.gradient else batches.padded()).part(rank, world)
            watches = [watch for watch in self._watches[name] if watch.gauges]
            with contextlib.ExitStack() as stack:
                stack.enter_context(inference(self._vlm.model))
                stack.enter_context(without_cache(self._vlm.model))
                stack.enter_context(torch.set_grad_enabled(kind.gradient))
                for watch in watches:
                    stack.enter_context(hooked(watch.hooks()))
                for batch in track(own, description=f"{description}: {name}"):
                    _run(self._vlm, batch, watches, loss)
            for watch in watches:
                if not all(bool(each.total.isfinite().all()) for each in watch.gauges.values()):
                    raise DataError(
                        f"The metric '{name}' is not finite in the tower '{watch.tower.name}'. "
                        "Open the model in another dtype, or leave out the samples it fails on."
                    )

    def sums(self) -> Sequence[torch.Tensor]:
        """Return the sums; see `Summed`."""
        return [
            each
            for watches in self._watches.values()
            for watch in watches
            for each in (watch.samples, *(gauge.total for gauge in watch.gauges.values()))
        ]

    def results(self, tower: str) -> dict[str, Any]:
        """Return fields of `TowerScores`: importance and group_samples."""
        seen = {
            name: watch
            for name, watches in self._watches.items()
            for watch in watches
            if watch.tower.name == tower and watch.samples
        }
        return {
            "importance": {name: watch.results() for name, watch in seen.items()},
            "group_samples": {name: int(watch.samples) for name, watch in seen.items()},
        }


def _run(vlm: VLM, batch: Batch, watches: Sequence[_Watch], loss: SampleLoss | None) -> None:
    for watch in watches:
        watch.units = None
        watch.gates.clear()
        watch.describe = partial(batch.units, vlm, watch.tower)
    if loss is None:
        vlm.model(**to_model(for_states(vlm.model, batch.inputs), vlm))
        return
    # of the sum, a token gets the slope of its own sample's loss, whatever shares the batch
    total = loss(to_model(batch.inputs, vlm)).sum()
    gates = [entry for watch in watches for entry in watch.gates]
    if not gates:
        # a batch without images has nothing for a vision tower
        return
    found = torch.autograd.grad(total, [entry[2] for entry in gates], allow_unused=True)
    for (gauge, units, _), slope in zip(gates, found, strict=True):
        if slope is not None:
            flat = slope.reshape(-1, slope.shape[-1])
            gauge.total += _per_sample(flat, units)[0].abs().sum(0)
