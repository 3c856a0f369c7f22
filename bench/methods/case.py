"""What a method is given and what it gives: the types that all methods of the benchmark share."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from subjects import Subject, train_samples

import interlace as il
from interlace._recommended import RECOMMENDED_PRUNE
from interlace._torch_utils import inference
from interlace.data.collate import Collator
from interlace.errors import PlanError
from interlace.models.handle import to_model
from interlace.models.states import layer_input, standing_in
from interlace.progressive.loss import CompensatedLoss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from interlace.config import HealSettings

BATCH_SIZE = 32
# What a loss-greedy rule judges by; a pass over them is paid for every layer in every round.
LOSS_SAMPLES = 64
# What our own rule repairs students with and judges them by, half and half, as often.
REPAIR_SAMPLES = 128


@dataclass(frozen=True)
class Sizes:
    """How many samples are used for what.

    Attributes:
        calibration: to score and to fit with.
        heal_samples: to heal with; below 1 a share of those that the model was trained on, 0 to
            measure before healing only.
        heal_batch: samples per step of healing.
        held_out: to measure on, per task.
        contrastive_batch: the same where samples are compared within a batch, so that a smaller
            one is an easier task; 0 for as many.
        validation: share of the samples to heal with that says how far to go.
    """

    calibration: int
    heal_samples: float
    heal_batch: int
    held_out: int
    contrastive_batch: int = 0
    validation: float = 0.0


class Shared:
    """What depends on the model and the seed alone, made when first asked for and kept."""

    def __init__(self, subject: Subject, vlm: Any, seed: int, sizes: Sizes) -> None:
        """Say which model and seed.

        Args:
            subject: the model's entry.
            vlm: the dense model.
            seed: of the samples and of what methods draw.
            sizes: numbers of samples.
        """
        self.subject, self.vlm, self.seed, self.sizes = subject, vlm, seed, sizes
        self._losses: dict[tuple[str, frozenset[int]], float] = {}
        self._scored: dict[tuple[str, ...], il.Scores] = {}

    @cached_property
    def calibration(self) -> Any:
        """Samples to score and to fit with."""
        return train_samples(self.subject, self.vlm, self.seed, 0, self.sizes.calibration)

    @cached_property
    def healing(self) -> Any:
        """Samples to heal with."""
        return train_samples(self.subject, self.vlm, self.seed, 1, self.sizes.heal_samples)

    @cached_property
    def scores(self) -> il.Scores:
        """Similarity of all pairs of hidden states."""
        return self.scored("similarity")

    @cached_property
    def width_scores(self) -> il.Scores:
        """Importance of heads and neurons."""
        return self.scored("similarity", "head_norm", "ffn_norm")

    def scored(self, *metrics: str) -> il.Scores:
        """Score by metrics; what is known is kept."""
        if metrics not in self._scored:
            self._scored[metrics] = il.score(
                self.vlm,
                self.calibration,
                metrics=metrics,
                packs="all",
                towers=self.subject.towers,
                batch_size=BATCH_SIZE,
            )
        return self._scored[metrics]

    @cached_property
    def repaired_loss(self) -> CompensatedLoss:
        """How far a student with folded cuts is from the dense model; what is known is kept."""
        return CompensatedLoss(
            self.vlm,
            self.calibration[:REPAIR_SAMPLES],
            BATCH_SIZE,
            "fold",
            RECOMMENDED_PRUNE.token_weights,
        )

    @cached_property
    def _loss_batches(self) -> list[dict[str, Any]]:
        collate = Collator(self.vlm.processor, self.subject.objective)
        samples = self.calibration[:LOSS_SAMPLES]
        starts = range(0, len(samples), BATCH_SIZE)
        batches = [collate(samples[start : start + BATCH_SIZE]) for start in starts]
        return [to_model(batch, self.vlm) for batch in batches]

    def loss(self, tower: str, drop: tuple[int, ...]) -> float:
        """Return the model's own loss on calibration samples without some layers of a tower.

        What is known is kept: a greedy rule asks at every fraction what it asked at smaller ones.
        """
        key = (tower, frozenset(drop))
        if key not in self._losses:
            with skipping([self.vlm.towers[tower].layers[i] for i in drop]):
                self._losses[key] = self.loss_of(self.vlm.model)
        return self._losses[key]

    def loss_of(self, model: Any) -> float:
        """Return the own loss of a model on calibration samples."""
        options = {"return_loss": True} if self.subject.objective == "contrastive" else {}
        with inference(model):
            return statistics.fmean(
                float(model(**batch, **options).loss) for batch in self._loss_batches
            )


@contextlib.contextmanager
def skipping(layers: list[Any]) -> Iterator[None]:
    """Let layers hand on the hidden states that they are given, as if they were not there."""

    def hand_on(*args: Any, **kwargs: Any) -> torch.Tensor:
        return layer_input(args, kwargs, "A skipped layer")

    with standing_in(layers, lambda _: hand_on):
        yield


@dataclass(frozen=True)
class Case:
    """What a method is given.

    Attributes:
        shared: the dense model, its scores, the samples to calibrate and to heal with.
        fraction: share of the layers of every tower that is to go, 0..1; methods that drop none
            take out as many of the layers' parameters.
        settings: of healing, the same for all methods.
        bridges: at the cuts, for methods that take them.
        exact: methods that can take out the share itself do so, where by default they take as much
            as whole layers come to.
    """

    shared: Shared
    fraction: float
    settings: HealSettings
    bridges: str = "none"
    exact: bool = False

    @property
    def vlm(self) -> Any:
        """The dense model."""
        return self.shared.vlm

    def counts(self) -> dict[str, int]:
        """Return tower -> layers that go, int(L * fraction) as published."""
        return counts_of(self.shared.subject, self.vlm, self.fraction)

    def share(self, tower: str) -> float:
        """Return the share of the parameters of a tower's layers that is to go.

        Raises:
            PlanError: none are.
        """
        number = len(self.vlm.towers[tower].layers)
        share = self.fraction if self.exact else self.counts()[tower] / number
        if not share:
            raise PlanError(
                f"{self.fraction:g} of the {number} layers of the {tower} tower is less than one "
                "layer. Take out a larger share."
            )
        return share

    def parameters(self, tower: str) -> int:
        """Return how many parameters of the layers of a tower are to go; raises as `share`."""
        total = sum(each.numel() for each in self.vlm.towers[tower].layers.parameters())
        return int(total * self.share(tower))


def counts_of(subject: Subject, vlm: Any, fraction: float) -> dict[str, int]:
    """Return tower -> number of layers that a fraction comes to."""
    return {name: int(vlm.towers[name].num_layers * fraction) for name in subject.towers}


@dataclass(frozen=True)
class Made:
    """What a method gives.

    Attributes:
        student: the student.
        note: what a reader of the result should know.
        healed: what was spent on healing, where the student is healed already.
        same_as: method that makes and heals the same student, which is not made again.
    """

    student: Any
    note: str = ""
    healed: il.HealReport | None = None
    same_as: str = ""


def heal(case: Case, student: Any, **overrides: Any) -> il.HealReport:
    """Heal in the common way: the plan's `tune` layers, cross-entropy, divergence, hidden states.

    Args:
        case: with the samples and the settings.
        student: what the method made; changed in place.
        overrides: loss weights of a method that has its own. Samples, batch and epochs stay.
    """
    settings = case.settings.replace(**overrides)
    return il.heal(student, teacher=case.vlm, data=case.shared.healing, settings=settings)


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller.

    Attributes:
        make: makes the student; raises PlanError, in words, where it cannot.
        heal: heals it in place, on the case's samples and settings.
        fractions: the only shares it can take out; None for any.
        sparse: weights are zeroed, not taken out, so the non-zero ones are counted too.
        timed: methods of one group have equally fast students, so one of them is timed; "layers"
            are those that only drop layers.
        fast: the form of the student that is timed, where it is another one; None where this
            device has none.
        bridges: it takes bridges.
        together: methods of one name are measured by one process, since they share dear work.
    """

    make: Callable[[Case], Made]
    heal: Callable[..., il.HealReport] = heal
    fractions: tuple[float, ...] | None = None
    sparse: bool = False
    timed: str = "layers"
    fast: Callable[[Any], Any] | None = None
    bridges: bool = False
    together: str = ""
