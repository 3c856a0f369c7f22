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

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from interlace._progress import track
from interlace._torch_utils import accepts, inference, sum_over_processes, without_cache
from interlace.errors import DataError, ShapeError
from interlace.models.fisher import Fisher, State
from interlace.models.handle import to_model
from interlace.models.sites import find_sites
from interlace.models.states import layer_input
from interlace.scores.elimination import prices
from interlace.scores.metrics import NUM_MODALITIES
from interlace.scores.widths import rounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from interlace.models.handle import VLM, Tower
    from interlace.models.sites import Site
    from interlace.scores.batches import Batch, Batches
    from interlace.scores.metrics import Units

# Of the mean over all directions: few samples do not show all that matter.
_DAMPING = 0.1


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
    """Collects A and G of all sites in one go over the data.

    Memory: 4 C^2 bytes per site and 4 D^2 per layer on the CPU, and the latter on the device too.
    """

    def __init__(self, vlm: VLM, towers: Sequence[Tower], classes: Mapping[str, type[Obs]]) -> None:
        """Make empty sums.

        Args:
            vlm: the model; left as it was.
            towers: the towers to watch.
            classes: metric name -> its class.
        """
        self._vlm = vlm
        self._names = " and ".join(f"'{name}'" for name in classes)
        metrics = {kind.kind: name for name, kind in classes.items()}
        self._watches = {tower.name: _Watch(tower, metrics) for tower in towers}
        self._moments = {
            (name, state): torch.zeros(width, width)
            for name, watch in self._watches.items()
            for state, width in watch.widths().items()
        }

    def run(self, batches: Batches, rank: int, world: int, description: str) -> None:
        """Measure on this process's share of the data.

        Raises:
            ConfigError: the weights allow no gradients.
            DataError: a batch without answers, or values that are not finite.
        """
        instead = "'head_norm' and 'ffn_norm'"
        fisher = Fisher(self._vlm, self._names, instead)
        part = batches.labelled().part(rank, world)
        with inference(self._vlm.model), without_cache(self._vlm.model):
            for batch in track(part, description=f"{description}: {self._names}"):
                self._add(batch, fisher)
        for watch in self._watches.values():
            for squares in watch.squares.values():
                if not bool(squares.isfinite().all()):
                    raise DataError(
                        f"{self._names}: activations of the tower '{watch.tower.name}' are not "
                        "finite. Open the model in another dtype, or leave out the samples it "
                        "fails on."
                    )

    def _add(self, batch: Batch, fisher: Fisher) -> None:
        inputs = to_model(batch.inputs, self._vlm)
        traces = fisher.traces(inputs, self._watches, self._moments, seed=batch.number)
        # logits would be of no use here
        if accepts(self._vlm.model, "logits_to_keep"):
            inputs = {k: v for k, v in inputs.items() if k != "labels"} | {"logits_to_keep": 1}
        with contextlib.ExitStack() as stack:
            for name, watch in self._watches.items():
                stack.enter_context(watch.hooked(self._vlm, batch, traces.get(name, {})))
            self._vlm.model(**inputs)

    def share(self) -> None:
        """Add up what all processes have seen; every process calls it."""
        for state in self._moments:
            self._moments[state] = sum_over_processes(self._moments[state])
        for watch in self._watches.values():
            for key in watch.squares:
                watch.squares[key] = sum_over_processes(watch.squares[key])
            watch.samples = int(sum_over_processes(torch.tensor([watch.samples])))

    def results(self, tower: str) -> dict[str, Any]:
        """Return fields of `TowerScores`: importance and group_samples."""
        watch = self._watches[tower]
        if not watch.samples:
            return {"importance": {}, "group_samples": {}}
        importance = watch.results(self._moments)
        return {
            "importance": importance,
            "group_samples": dict.fromkeys(importance, watch.samples),
        }


# metric, place in the layer, position of the layer
_Key = tuple[str, str, int]


class _Watch:
    """One tower with the sites of all metrics."""

    def __init__(self, tower: Tower, metrics: Mapping[str, str]) -> None:
        self.tower = tower
        self._sites: dict[_Key, Site] = {
            (metrics[site.kind], name, position): site
            for position, layer in enumerate(tower.layers)
            for name, site in find_sites(layer).items()
            if site.kind in metrics and site.groups
        }
        self.squares = {
            key: torch.zeros(site.output.in_features, site.output.in_features)
            for key, site in self._sites.items()
        }
        self.samples = 0
        # of the run that is under way: state -> [N]
        self._weights: dict[int, Tensor] = {}

    def widths(self) -> dict[int, int]:
        """Return the states behind layers with sites -> D."""
        return {place + 1: each.output.out_features for (*_, place), each in self._sites.items()}

    @contextlib.contextmanager
    def hooked(
        self, vlm: VLM, batch: Batch, traces: Mapping[int, Sequence[Tensor]]
    ) -> Iterator[None]:
        runs = 0

        def begin(_: Any, args: Any, kwargs: Any) -> None:
            nonlocal runs
            hidden = layer_input(args, kwargs, f"Layer 0 of the tower '{self.tower.name}'")
            units = batch.units(vlm, self.tower, hidden)
            self._weights = {s: _weights(units, each[runs]) for s, each in traces.items()}
            self.samples += units.num_seen
            runs += 1

        def reading(key: _Key) -> Any:
            def hook(_: Any, args: Any) -> None:
                columns = args[0].detach().reshape(-1, args[0].shape[-1]).float()
                weight = self._weights[key[2] + 1].to(columns)
                if len(weight) != len(columns):
                    raise ShapeError(
                        f"A projection of '{key[1]}' reads {len(columns)} tokens, but its layer "
                        f"was given {len(weight)}; '{key[0]}' cannot be told."
                    )
                weighed = columns * weight.sqrt()[:, None]
                self.squares[key] += (weighed.T @ weighed).to(self.squares[key])

            return hook

        with contextlib.ExitStack() as stack:
            first = self.tower.layers[0]
            stack.callback(first.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for key, site in self._sites.items():
                stack.callback(site.output.register_forward_pre_hook(reading(key)).remove)
            yield

    def results(self, moments: Mapping[State, Tensor]) -> dict[str, dict[str, Any]]:
        made: dict[str, dict[str, Any]] = {}
        for (metric, place, position), site in self._sites.items():
            rows = made.setdefault(metric, {}).setdefault(place, [()] * self.tower.num_layers)
            weight = site.output.weight.detach().double()
            moment = moments[self.tower.name, position + 1].to(weight) / self.samples
            moment.diagonal().add_(_DAMPING * moment.diagonal().mean())
            squares = self.squares[metric, place, position].to(weight) / self.samples
            found = prices(squares, weight.T @ moment @ weight, site.head_dim) / 2
            rows[position] = tuple(rounded(found))
        return {
            metric: {place: tuple(rows) for place, rows in places.items()}
            for metric, places in made.items()
        }


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
