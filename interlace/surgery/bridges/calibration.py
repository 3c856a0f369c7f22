"""Calibration data for bridges: batches on the CPU, and how much every token counts.

Legend: N tokens of one run of a tower, padding included.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from interlace._torch_utils import FORWARD_REFUSALS
from interlace.data import Collator
from interlace.data.given import samples_or_batches
from interlace.data.samples import Sample, samples, scenes_tasks
from interlace.errors import ConfigError, DataError, check_numbers
from interlace.models.fisher import Fisher
from interlace.models.handle import to_model
from interlace.models.predictor import for_states
from interlace.models.states import hooked, watch_state
from interlace.models.tokens import token_units
from interlace.surgery.bridges.front import Front, modules_in_front
from interlace.surgery.bridges.names import BRIDGE_SAMPLES, EVEN, FISHER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from interlace.models.handle import VLM

# Every so manieth sample is held out.
HELD_OUT_EVERY = 4
# Beside their Fisher traces, which are 1 on average, all tokens count this much: what later layers
# make of a state that hardly matters is not left to chance, and few samples fit few tokens badly.
_ALIKE = 1.0


def default_data(vlm: VLM) -> tuple[Sequence[Sample], str]:
    """Return the built-in scenes, and a note for the manifest that they were used.

    Raises:
        ConfigError: the model has no processor to give them to.
    """
    if vlm.processor is None:
        raise ConfigError(
            f"Bridges are fitted on samples, and {vlm.name} was opened without a processor that "
            "could read any. Give data= as batches of the model's inputs, or open the model with "
            "its processor."
        )
    tasks = scenes_tasks(vlm.family.objective)
    made = samples("scenes", count=BRIDGE_SAMPLES, seed=0, tasks=tasks, processor=vlm.processor)
    note = (
        f"no data was given for the bridges, so they were fitted on {BRIDGE_SAMPLES} built-in "
        "scenes (seed 0)"
    )
    return made, note


class Calibration:
    """The batches of the data, kept in memory: every cut runs over all of them.

    What the teacher showed is kept too, so that one calibration can serve many students of it.

    Attributes:
        batches: what the model's forward takes, on the CPU.
        probes: likewise, to see how layers work: a single sample first, where one is known, then
            all batches, since not every one need reach every tower.
        fingerprint: of the data, where it has one.
        token_weights: by what the tokens count, as of `prune`.
    """

    def __init__(
        self,
        vlm: VLM,
        data: Any,
        batch_size: int,
        probe: Mapping[str, Any] | None = None,
        token_weights: str = EVEN,
    ) -> None:
        """Collate samples with their answers, or take batches as they are.

        Args:
            vlm: the teacher.
            data: samples or batches.
            batch_size: samples per batch.
            probe: a batch of a single sample, where batches are given.
            token_weights: as of `prune`.

        Raises:
            ConfigError: a bad batch size, or samples for a model without a processor.
            DataError: no data, or items that are neither all samples nor all batches.
        """
        check_numbers(batch_size=batch_size)
        items = list(samples_or_batches(data, "data for bridges"))
        self._vlm = vlm
        self.fingerprint: str = getattr(data, "fingerprint", "")
        if isinstance(items[0], Sample):
            collate = Collator.for_model(vlm)
            # samples of like length share a batch, so little is spent on padding
            items.sort(key=lambda each: sum(len(turn.text) for turn in each.turns))
            starts = range(0, len(items), batch_size)
            probe = collate(items[:1])
            items = [collate(items[first : first + batch_size]) for first in starts]
        self.batches = [dict(item) for item in items]
        self.probes = [*([dict(probe)] if probe is not None else []), *self.batches]
        self.token_weights = token_weights
        self._fronts: dict[nn.Module, Front] = {}
        # tower -> what ends before it begins, and what that gave in the teacher
        self._in_front: dict[str, tuple[dict[str, str], dict[str, dict[Any, Any]]]] = {}
        self._surveyed: dict[frozenset[str], dict[str, TokenWeights]] = {}

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Run either model on a batch."""
        front = self._fronts.get(model)
        with front.resting(batch) if front is not None else contextlib.nullcontext():
            return model(**to_model(for_states(model, batch), self._vlm))

    @contextlib.contextmanager
    def looking_at(self, tower: str, student: nn.Module, changed: Iterable[str]) -> Iterator[None]:
        """Run the modules in front of a tower once per batch and replay their outputs afterwards.

        Nothing may change these modules inside the block.

        Args:
            tower: name of the tower.
            student: the other model that is run beside the teacher.
            changed: towers in which the two differ.
        """
        vlm = self._vlm
        if tower not in self._in_front:
            others = {name: each.path for name, each in vlm.towers.items() if name != tower}
            runs = (partial(self.run, vlm.model, batch) for batch in self.batches)
            found = modules_in_front(vlm.model, vlm.towers[tower].path, others, runs)
            self._in_front[tower] = found, {path: {} for path in found.values()}
        found, kept = self._in_front[tower]
        # what a changed tower gives may go through others that are alike
        alike = found.keys().isdisjoint(changed)
        own = kept if alike else {path: {} for path in kept}
        self._fronts = {vlm.model: Front(vlm.model, kept), student: Front(student, own)}
        try:
            yield
        finally:
            self._fronts.clear()

    def _try(self, number: int, batch: Mapping[str, Any]) -> None:
        """Run the teacher on a batch for the first time, and word what it refuses."""
        try:
            self.run(self._vlm.model, batch)
        except FORWARD_REFUSALS as error:
            raise DataError(
                f"{self._vlm.name} cannot be run on batch {number} of the data for bridges (with "
                f"{', '.join(batch)}): {type(error).__name__}: {str(error).strip()[:200]}. Give "
                "batches that its forward takes; if memory ran out, lower batch_size."
            ) from error

    def survey(self, towers: Iterable[str]) -> dict[str, TokenWeights]:
        """Run the teacher once over all batches and count the tokens of every tower.

        Args:
            towers: the towers to look at.

        Returns:
            Tower -> its token weights, in the order in which the towers run.

        Raises:
            DataError: the model cannot be run on the data, or less than 4 samples (images, in
                towers that read them) run through one of the towers; or as `Fisher` raises it.
            ConfigError: as `Fisher` raises it.
            FamilyError: likewise.
        """
        num_units = dict.fromkeys(towers, 0)
        wanted = frozenset(num_units)
        if wanted in self._surveyed:
            return self._surveyed[wanted]
        counts: dict[str, torch.Tensor] = {}
        batch: Mapping[str, Any] = {}

        def note(name: str, hidden: torch.Tensor) -> None:
            units, modality = token_units(self._vlm, name, batch, hidden)
            found = torch.bincount(modality[modality >= 0].long().cpu(), minlength=2)
            counts[name] = counts.get(name, torch.zeros_like(found)) + found
            num_units[name] += _num_units(units)

        with hooked(
            watch_state(self._vlm.towers[name].layers, 0, name, partial(note, name))
            for name in num_units
        ):
            for number, batch in enumerate(self.batches):
                self._try(number, batch)
        for name, count in num_units.items():
            if count < HELD_OUT_EVERY:
                unit = "samples" if name.startswith("text") else "images"
                raise DataError(
                    f"{count} {unit} of the data for bridges run through the tower '{name}'; at "
                    f"least {HELD_OUT_EVERY} are needed, since some are held out. Give more data, "
                    "or no bridge to this tower."
                )
        found = {name: TokenWeights(self._vlm, name, count) for name, count in counts.items()}
        if self.token_weights == FISHER:
            self._ask_predictions(found)
        self._surveyed[wanted] = found
        return found

    def _ask_predictions(self, weights: Mapping[str, TokenWeights]) -> None:
        """Give the token weights of towers the Fisher traces of their tokens."""
        vlm = self._vlm
        fisher = Fisher(vlm)
        for batch in self.batches:
            inputs = to_model(batch, vlm)
            try:
                found = fisher.traces(inputs, weights)
            except torch.OutOfMemoryError as error:
                raise DataError(
                    "Memory ran out in the backward passes of token_weights='fisher', which take "
                    "more of it than fitting. Lower batch_size, or take token_weights='even'."
                ) from error
            for name, traces in found.items():
                weights[name].learn(traces)


def _num_units(units: torch.Tensor) -> int:
    return int(units.max()) + 1 if units.numel() else 0


class TokenWeights:
    """How much every token of a tower counts: text and image tokens have equal mass in all.

    Where the traces of the Fisher information are known, tokens count by them as well, each state
    of the tower by its own (models/fisher.py).
    """

    def __init__(self, vlm: VLM, tower: str, counts: torch.Tensor) -> None:
        """Fix the weights.

        Args:
            vlm: the teacher.
            tower: the tower.
            counts: tokens of each modality in all batches, [2].
        """
        self._vlm = vlm
        self._tower = tower
        present = int((counts > 0).sum())
        mass = torch.where(counts > 0, 1.0 / (present * counts.clamp_min(1)).double(), 0.0)
        # padding has the number -1, so it takes the last entry
        self._mass = torch.cat([mass, mass.new_zeros(1)])
        self._seen = self._run = 0
        # state -> the traces of every run, in the order of the batches
        self._traces: dict[int, list[torch.Tensor]] = {}
        self._means: dict[int, float] = {}
        self._count = int(counts.sum())

    def learn(self, traces: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Add the Fisher traces of a batch: state -> [N] of every run."""
        for state, runs in traces.items():
            self._traces.setdefault(state, []).extend(runs)

    def restart(self) -> None:
        """Begin a pass over the batches."""
        self._seen = self._run = 0

    def of(
        self, batch: Mapping[str, Any], hidden: torch.Tensor, state: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of the tokens of the tower's next run.

        Args:
            batch: the inputs the models were run on.
            hidden: hidden states of the run.
            state: number of the state in the teacher, 0..L.

        Returns:
            (weight [N] fp64, 0 for padding; held out [N] bool), on the device of `hidden`.
        """
        units, modality = token_units(self._vlm, self._tower, batch, hidden)
        weight = self._mass.to(modality.device)[modality.long()]
        held = (units + self._seen) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        if self._traces:
            trace = self._traces[state][self._run].to(weight)
            weight = weight * (trace / self._mean(state) + _ALIKE)
        self._seen += _num_units(units)
        self._run += 1
        return weight, held

    def _mean(self, state: int) -> float:
        """Return the mean trace of a state over all tokens but padding, whose traces are 0."""
        if state not in self._means:
            total = sum(float(each.sum()) for each in self._traces[state])
            # where no prediction hangs on the state, all tokens count alike
            self._means[state] = total / self._count if total else 1.0
        return self._means[state]
