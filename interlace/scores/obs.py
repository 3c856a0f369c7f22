"""head_obs, ffn_obs: what heads and neurons cost that go one after the other, the rest refitted.

Legend: N tokens of one run, C input columns of an output projection W, D width, S samples.

A unit that says what others say as well costs little once those are refitted, which the norm of
what it adds does not show. In each projection the unit goes next whose loss the others make up for
best (elimination.py), and what is left unexplained, e = (W - W') x, is charged by what it does to
the predictions. With the slopes g at the state behind the layer (models/fisher.py)

    KL  ~  1/2 sum over tokens of E (g . e)^2  ~  1/2 tr (W - W')' G (W - W') A
    G = sum over tokens of E g g' + 0.1 tr(G) / D,     A = mean over tokens of weight x x'

the mean of both over samples: the curvature taken apart into that of outputs and that of inputs.
Half of the weight of a token is the same for all of its modality in a sample, and text and image
tokens have as much in all; the other half goes by |g|^2 too. Scores that are merged from parts hold
the mean of the parts' prices.

Source: Optimal Brain Surgeon (see elimination.py) on the factored curvature of K-FAC (Martens &
Grosse 2015, arXiv 1503.05671, section 3); both together in "The LLM Surgeon" (van der Ouderaa et
al. 2024, arXiv 2312.17244).
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from interlace._progress import track
from interlace._torch_utils import (
    failing_together,
    inference,
    sum_over_processes,
    without_cache,
)
from interlace.errors import DataError, ShapeError
from interlace.models.fisher import Fisher
from interlace.models.handle import to_model
from interlace.models.predictor import for_states
from interlace.models.sites import find_sites
from interlace.models.states import hooked, watch_state
from interlace.scores.elimination import prices
from interlace.scores.metrics import NUM_MODALITIES
from interlace.scores.widths import rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from interlace.models.fisher import Moments, State, Traces
    from interlace.models.handle import VLM, Tower
    from interlace.models.sites import Site
    from interlace.scores.batches import Batch, Batches
    from interlace.scores.metrics import Units

# Of the mean over all directions: few samples do not show all that matter.
_DAMPING = 0.1
# Bytes that are collected in one pass over the data.
_LOT = 4 << 30


class Obs:
    """A metric of this file; `kind` is "heads" or "ffn", the sites it is for."""

    kind: ClassVar[str]


class HeadObs(Obs):
    """Divergence per sample that a query head adds at its turn; [0, inf), nats."""

    kind = "heads"


class FfnObs(Obs):
    """Divergence per sample that a neuron adds at its turn; [0, inf), nats."""

    kind = "ffn"


class Eliminations:
    """Collects A and G of all sites and prices their units.

    Memory: 4 D^2 bytes per layer, on the CPU and on the device; then, on the device alone, 4 C^2
    per site for as many sites as 4 GiB hold, with one pass over the data for each such lot, and 32
    C^2 for the site that is being priced.
    """

    def __init__(self, vlm: VLM, towers: Sequence[Tower], classes: Mapping[str, type[Obs]]) -> None:
        """Find the sites.

        Args:
            vlm: the model; left as it was.
            towers: the towers to watch.
            classes: metric name -> its class.
        """
        self._vlm = vlm
        self._names = " and ".join(f"'{name}'" for name in classes)
        metrics = {kind.kind: name for name, kind in classes.items()}
        self._sites: Sites = {
            _Key(tower.name, metrics[site.kind], place, position): site
            for tower in towers
            for position, layer in enumerate(tower.layers)
            for place, site in find_sites(layer).items()
            if site.kind in metrics and site.groups
        }
        self._samples: dict[str, int] = {}
        self._found: dict[_Key, tuple[float, ...]] = {}

    def run(self, batches: Batches, rank: int, world: int, description: str) -> None:
        """Measure on this process's share of the data; every process calls it.

        Raises:
            ConfigError: the weights allow no gradients.
            DataError: a batch without answers, values that are not finite, or a failed process.
        """
        part = batches.labelled().part(rank, world)
        label = f"{description}: {self._names}"
        moments = {
            key.state: torch.zeros(site.output.out_features, site.output.out_features)
            for key, site in self._sites.items()
        }
        with inference(self._vlm.model), without_cache(self._vlm.model):
            with failing_together():
                traces = self._traces(track(part, description=label), moments)
            for state in moments:
                moments[state] = sum_over_processes(moments[state])
            lots = _lots(self._sites)
            for number, sites in enumerate(lots, 1):
                lot = _Lot(sites)
                with failing_together():
                    self._read(
                        track(part, description=f"{label}, {number}/{len(lots)}"), lot, traces
                    )
                for tower, samples in lot.samples.items():
                    self._samples[tower] = int(sum_over_processes(torch.tensor(samples)))
                for key, site in sites.items():
                    squares = sum_over_processes(lot.squares.pop(key).cpu())
                    samples = self._samples[key.tower]
                    if samples:
                        moment = moments[key.state] / samples
                        self._found[key] = _priced(site, squares / samples, moment)

    def _traces(self, batches: Iterable[Batch], moments: Moments) -> dict[int, Traces]:
        """Return the Fisher traces of the tokens of every batch, and add up G."""
        fisher = Fisher(self._vlm, self._names, "'head_norm' and 'ffn_norm'")
        towers = {key.tower for key in self._sites}
        return {
            batch.number: fisher.traces(
                to_model(batch.inputs, self._vlm), towers, moments, seed=batch.number
            )
            for batch in batches
        }

    def _read(self, batches: Iterable[Batch], lot: _Lot, traces: Mapping[int, Traces]) -> None:
        for batch in batches:
            inputs = to_model(for_states(self._vlm.model, batch.inputs), self._vlm)
            with hooked(lot.hooks(self._vlm, batch, traces[batch.number])):
                self._vlm.model(**inputs)
        for key, squares in lot.squares.items():
            if not bool(squares.isfinite().all()):
                raise DataError(
                    f"{self._names}: activations of the tower '{key.tower}' are not finite. Open "
                    "the model in another dtype, or leave out the samples it fails on."
                )

    def results(self, tower: str) -> dict[str, Any]:
        """Return fields of `TowerScores`: importance and group_samples."""
        depth = self._vlm.towers[tower].num_layers
        made: dict[str, dict[str, list[tuple[float, ...]]]] = {}
        for key, values in self._found.items():
            if key.tower == tower:
                rows = made.setdefault(key.metric, {}).setdefault(key.place, [()] * depth)
                rows[key.position] = values
        return {
            "importance": {
                metric: {place: tuple(rows) for place, rows in places.items()}
                for metric, places in made.items()
            },
            "group_samples": dict.fromkeys(made, self._samples.get(tower, 0)),
        }


class _Key(NamedTuple):
    """A site: its tower, what prices it, its place in a layer and the position of that layer."""

    tower: str
    metric: str
    place: str
    position: int

    @property
    def state(self) -> State:
        """The state behind the layer."""
        return self.tower, self.position + 1


Sites = dict[_Key, "Site"]


def _lots(sites: Sites) -> list[Sites]:
    """Part the sites by the memory of what is collected for them; no lot is empty."""
    lots: list[Sites] = []
    room = 0
    for key, site in sites.items():
        size = 4 * site.output.in_features**2
        if size > room or not lots:
            lots.append({})
            room = _LOT
        lots[-1][key] = site
        room -= size
    return lots


class _Lot:
    """What is collected for some sites in one pass over the data."""

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self.squares = {
            key: torch.zeros(
                site.output.in_features, site.output.in_features, device=site.output.weight.device
            )
            for key, site in sites.items()
        }
        self.samples = {key.tower: 0 for key in sites}
        # of the run of a tower that is under way: state -> [N]
        self._weights: dict[State, Tensor] = {}

    def hooks(self, vlm: VLM, batch: Batch, traces: Traces) -> Iterator[RemovableHandle]:
        """Set the hooks that watch one batch."""
        for name in self.samples:
            tower = vlm.towers[name]
            take = self._beginning(vlm, tower, batch, traces.get(name, {}))
            yield watch_state(tower.layers, 0, name, take)
        for key, site in self._sites.items():
            yield site.output.register_forward_pre_hook(partial(self._read, key))

    def _beginning(
        self, vlm: VLM, tower: Tower, batch: Batch, traces: Mapping[int, Sequence[Tensor]]
    ) -> Callable[[Tensor], None]:
        runs = itertools.count()

        def take(hidden: Tensor) -> None:
            units = batch.units(vlm, tower, hidden)
            run = next(runs)
            for state, each in traces.items():
                self._weights[tower.name, state] = _weights(units, each[run])
            self.samples[tower.name] += units.num_seen

        return take

    def _read(self, key: _Key, _: Any, args: Any) -> None:
        columns = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        weight = self._weights[key.state].to(columns)
        if len(weight) != len(columns):
            raise ShapeError(
                f"A projection of '{key.place}' reads {len(columns)} tokens, but its layer was "
                f"given {len(weight)}; '{key.metric}' cannot be told."
            )
        weighed = columns * weight.sqrt()[:, None]
        self.squares[key].addmm_(weighed.T, weighed)


def _priced(site: Site, squares: Tensor, moment: Tensor) -> tuple[float, ...]:
    """Return what every unit of a site costs, by the means A and G over samples."""
    weight = site.output.weight.detach().double()
    moment = moment.to(weight)
    moment.diagonal().add_(_DAMPING * moment.diagonal().mean())
    found = prices(squares, weight.T @ moment @ weight, site.head_dim) / 2
    return tuple(rounded(found))


def _weights(units: Units, trace: Tensor) -> Tensor:
    """Return what every token counts, [N] fp64: in all 1 per sample, 0 for padding."""
    counted = units.unit >= 0
    own = units.unit.clamp_min(0)
    counts = torch.bincount(units.bins(), minlength=units.num_bins + 1).double()
    present = (counts[:-1].view(-1, NUM_MODALITIES) > 0).sum(1)
    alike = counted / (present[own] * counts[units.bins()])
    by_trace = alike * trace.to(alike)
    sums = torch.zeros(len(present), dtype=alike.dtype, device=alike.device)
    sums = sums.index_add(0, own, by_trace)[own]
    # where no prediction hangs on a sample, its tokens count alike
    return torch.where(sums > 0, (alike + by_trace / sums) / 2, alike)
