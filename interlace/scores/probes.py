"""Metrics of the loss: what a probe is, and the pass over labelled batches that feeds all of them.

A probe is one file beside this one that holds one subclass of `Probe`, named in `METRICS`. Unlike a
`Meter`, which watches a run, it makes the model run in its own ways on a batch with answers.

Legend: B samples of a batch, L layers of a tower.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from interlace._torch_utils import (
    inference,
    union_over_processes,
    without_cache,
)
from interlace.errors import DataError
from interlace.models.handle import to_model
from interlace.scores.losses import SampleLoss
from interlace.scores.metrics import Summed
from interlace.scores.replay import Replay
from interlace.scores.similarity import Similarity
from interlace.scores.tap import Tap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from interlace.models.handle import VLM, Tower
    from interlace.scores.batches import Batch

# What an input passes through, in order; in contrastive models the towers stand side by side.
_FLOW = ("vision", "qformer", "text_encoder", "text")


class Trial:
    """One batch, ready to be run in any way.

    Attributes:
        vlm: the model, in eval mode and without a KV cache; gradients are off.
        batch: the batch, for the names of its samples.
        loss: runs the model on the batch and returns the losses of the samples, [B].
        replay: runs it with one layer changed, once the batch is recorded.
        baseline: the losses of the model as it is, [B], once the batch is recorded.
        num_samples: B, once a loss was checked.
    """

    def __init__(self, vlm: VLM, batch: Batch, loss: Callable[[], Tensor], replay: Replay) -> None:
        """Begin a batch."""
        self.vlm = vlm
        self.batch = batch
        self.loss = loss
        self.replay = replay
        self.num_samples = 0
        self.baseline = torch.empty(0)

    def record(self) -> None:
        """Run the model as it is and record it, so that replays can follow."""
        self.baseline = self.check(self.replay.record(self.loss))

    def check(self, losses: Tensor, what: str = "") -> Tensor:
        """Return losses that are finite.

        Args:
            losses: [B].
            what: what was done to the model, such as "without layer 3 of the tower 'text'"; empty
                for the model as it is.

        Raises:
            DataError: one is not; for the model as it is with the first layer whose activations
                are not.
        """
        self.num_samples = len(losses)
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if not bad:
            return losses
        if not what:
            _locate(self)
        names = self.batch.ids
        sample = f"sample '{names[bad[0]]}'" if bad[0] < len(names) else "one sample"
        raise DataError(
            f"The loss of {sample}, batch {self.batch.number}, is {float(losses[bad[0]])}"
            f"{f' {what}' if what else ''}. Open the model in another dtype (float16 overflows "
            "where bfloat16 and float32 do not), check its weights, or leave the sample out."
        )

    def num_reaching(self, tower: str) -> int:
        """Count the samples that have something for a tower: images, where it is not of text."""
        family, model = self.vlm.family, self.vlm.model
        named = (family.image_token_id(model), family.video_token_id(model))
        tokens = torch.tensor([token for token in named if token is not None])
        ids: Tensor | None = self.batch.inputs.get("input_ids")
        if tower.startswith("text") or ids is None or not len(tokens):
            return self.num_samples
        return int(torch.isin(ids, tokens.to(ids)).any(-1).sum())


def _locate(trial: Trial) -> None:
    """Raise for the first activations of a batch that are not finite, if there are any."""
    meters = {
        name: Similarity(tower.num_layers, (), whole=False)
        for name, tower in trial.vlm.towers.items()
    }
    trial.replay.forget()
    taps = {name: Tap(name, trial.vlm.towers[name].layers, [meters[name]]) for name in meters}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for name, tap in taps.items():
            stack.enter_context(tap)
            tap.start(partial(trial.batch.units, trial.vlm, trial.vlm.towers[name]))
        trial.loss()
        # what breaks one tower breaks those that read it, so the first to run comes first
        for name, tap in sorted(taps.items(), key=lambda item: item[1].began):
            bad = meters[name].finish() if tap.finish() else None
            if bad is not None:
                raise trial.batch.not_finite(trial.vlm.towers[name], bad)


class Probe(ABC):
    """Measures the layers of some towers by what the loss does.

    Attributes:
        replays: it runs the model with one layer changed, on a batch that was recorded; the others
            come before anything is recorded.
    """

    replays: ClassVar[bool] = True

    def __init__(self, vlm: VLM, towers: Mapping[str, Tower], num_directions: int) -> None:
        """Take the towers to measure, and how many random directions a layer is given, if any."""
        self.vlm = vlm
        self.towers = towers
        self.num_directions = num_directions
        # tower -> why it has no values; what `measure` gives for it is not shown then
        self.notes: dict[str, str] = {}

    @abstractmethod
    def measure(self, trial: Trial) -> dict[str, Tensor]:
        """Measure the towers that take part in a batch.

        Returns:
            tower -> [L], means over the samples of the batch.

        Raises:
            DataError: something is not finite; it says where.
        """

    @abstractmethod
    def forwards(self) -> float:
        """Return about how many forward passes a sample costs, beyond the one that is recorded."""

    def settings(self) -> dict[str, Any]:
        """Return what the values depend on, for the record."""
        return {}


def suffix_forwards(vlm: VLM, tower: str) -> float:
    """Estimate what running the model anew from each layer of a tower costs, in forward passes.

    Counted in layers, weighted by their parameters: L/2 for the last tower of a model; the layers
    of a tower that others read cost these others too.
    """
    sizes = {
        name: [sum(p.numel() for p in layer.parameters()) for layer in each.layers]
        for name, each in vlm.towers.items()
    }
    after = 0
    if vlm.family.objective != "contrastive" and tower in _FLOW:
        later = _FLOW[_FLOW.index(tower) + 1 :]
        after = sum(sum(sizes.get(name, ())) for name in later)
    own = sizes[tower]
    computed = sum(sum(own[layer + 1 :]) + after for layer in range(len(own)))
    return computed / max(1, sum(map(sum, sizes.values())))


class Probes(Summed):
    """Runs all probes over labelled batches and keeps sums that add up over processes."""

    def __init__(
        self,
        vlm: VLM,
        towers: Mapping[str, Tower],
        classes: Mapping[str, type[Probe]],
        num_directions: int,
    ) -> None:
        """Make the probes with empty sums."""
        self._vlm = vlm
        self._probes = {name: kind(vlm, towers, num_directions) for name, kind in classes.items()}
        self._sums = {
            (name, tower): torch.zeros(1 + each.num_layers, dtype=torch.float64)
            for name in classes
            for tower, each in towers.items()
        }
        self._refusals: dict[str, str] = {}

    def description(self) -> str:
        """Name the probes and what a sample costs, in forward passes of the model."""
        recorded = any(probe.replays for probe in self._probes.values())
        cost = recorded + sum(probe.forwards() for probe in self._probes.values())
        return f"{', '.join(self._probes)} (about {cost:.1f} forward passes per sample)"

    def settings(self) -> dict[str, Any]:
        """Return what the values depend on."""
        return {key: v for each in self._probes.values() for key, v in each.settings().items()}

    def run(self, batches: Iterable[Batch]) -> None:
        """Measure.

        Raises:
            DataError: no labels, or something is not finite.
            ShapeError: a layer cannot be skipped.
        """
        loss = SampleLoss(self._vlm)
        model = self._vlm.model
        replaying = any(probe.replays for probe in self._probes.values())
        verified = False
        with inference(model), without_cache(model), Replay(self._vlm.towers) as replay:
            for batch in batches:
                inputs = to_model(batch.inputs, self._vlm)
                trial = Trial(self._vlm, batch, partial(loss, inputs), replay)
                replay.forget()
                self._measure(trial, replays=False)
                if not replaying:
                    continue
                trial.record()
                if not verified:
                    replay.verify(trial.loss)
                    verified = True
                self._measure(trial, replays=True)
            self._refusals = dict(replay.refusals)

    def _measure(self, trial: Trial, *, replays: bool) -> None:
        for name, probe in self._probes.items():
            if probe.replays != replays:
                continue
            for tower, means in probe.measure(trial).items():
                sums = self._sums[name, tower]
                # the others of the batch have zeros in the means
                sums[0] += trial.num_reaching(tower)
                sums[1:] += trial.num_samples * means.double().cpu()

    def sums(self) -> Sequence[Tensor]:
        """Return the sums; see `Summed`."""
        return list(self._sums.values())

    def share_notes(self) -> None:
        """Give every process the notes of all: a tower may have run in some of them only."""
        self._refusals = union_over_processes(self._refusals)
        for probe in self._probes.values():
            probe.notes = union_over_processes(probe.notes)

    def results(self, tower: str) -> dict[str, Any]:
        """Return fields of `TowerScores`: metrics, group_samples and notes."""
        seen = {name: sums for (name, each), sums in self._sums.items() if each == tower}
        seen = {name: sums for name, sums in seen.items() if sums[0] > 0}
        notes = [each.notes[tower] for each in self._probes.values() if tower in each.notes]
        if tower in self._refusals and any(self._probes[name].replays for name in seen):
            notes.append(f"no replay: {self._refusals[tower]}")
        return {
            "metrics": {
                name: tuple((sums[1:] / sums[0]).tolist())
                for name, sums in seen.items()
                if tower not in self._probes[name].notes
            },
            "group_samples": {name: int(sums[0]) for name, sums in seen.items()},
            "notes": tuple(notes),
        }
