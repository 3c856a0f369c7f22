"""Calibration data as batches of the model's inputs, with the sample behind every token.

Legend: B samples of a batch, T tokens of a sample.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from interlace.data import Collator
from interlace.data.given import samples_or_batches
from interlace.data.sample_texts import check_num_images
from interlace.data.samples import IMAGE_PLACEHOLDER, Sample
from interlace.errors import DataError, check_numbers
from interlace.models.handle import check_compares
from interlace.models.tokens import token_units
from interlace.scores.metrics import NotFinite, Units
from interlace.scores.packing import pack, refuse_if_unpackable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from interlace.models.handle import VLM, Tower


# Towers whose units are the rows of a batch; those of the others are its images.
_TEXT_TOWERS = ("text", "text_encoder")


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        number: its number, from 0.
        ids: the names of its samples.
        images: the names of the samples that its images belong to, image by image, where known.
        inputs: what the model's forward takes, on the CPU.
        singles: the inputs of every sample by itself where they were packed into one row.
    """

    number: int
    ids: tuple[str, ...]
    images: tuple[str, ...]
    inputs: dict[str, Any]
    singles: tuple[dict[str, Any], ...] = ()

    def units(self, vlm: VLM, tower: Tower, hidden: torch.Tensor) -> Units:
        """Return the unit and the modality of every token that a tower is given.

        Args:
            vlm: the model.
            tower: the tower.
            hidden: h_0 as its first layer is given it.
        """
        unit, modality = token_units(vlm, tower.name, self.inputs, hidden)
        if self.singles and tower.name == "text":
            lengths = [single["input_ids"].shape[1] for single in self.singles]
            row = torch.repeat_interleave(torch.tensor(lengths))
            unit = row.to(unit.device)
        num_units = int(unit.max()) + 1 if unit.numel() else 0
        counts = modality >= 0
        return Units(unit.masked_fill(~counts, -1), modality.long().clamp_min(0), num_units)

    def name_of(self, tower: Tower, unit: int, num_units: int) -> str:
        """Name the sample of a unit of a tower; all of the batch where it is not known which."""
        names = self.ids if tower.name in _TEXT_TOWERS else self.images
        if len(names) == num_units:
            return f"sample '{names[unit]}'"
        return f"one of the samples {', '.join(repr(name) for name in self.ids)}"

    def not_finite(self, tower: Tower, bad: NotFinite) -> DataError:
        """Word the error of activations that are not finite."""
        where = f"the output of layer {bad.state - 1}" if bad.state else "the input of layer 0"
        return DataError(
            f"NaN or infinite activations in {where} of the tower '{tower.name}', batch "
            f"{self.number}, {self.name_of(tower, bad.unit, bad.num_units)}. Open the model in "
            "another dtype (float16 overflows where bfloat16 and float32 do not), check its "
            "weights, or leave the sample out."
        )


class Batches:
    """The batches of the data, each made when its turn comes."""

    def __init__(
        self,
        vlm: VLM,
        data: Sequence[Sample] | Iterable[Mapping[str, Any]],
        *,
        batch_size: int,
        answers: bool,
        packed: bool,
    ) -> None:
        """Check the data and fix which sample goes into which batch.

        Raises:
            ConfigError: a batch size below 1, a model without processor, or no way to pack.
            DataError: no data, items that are neither all samples nor all batches, or a sample
                with more or fewer images than the model takes.
        """
        check_numbers(batch_size=batch_size)
        items = samples_or_batches(data, "calibration data")
        self._vlm = vlm
        self._items = items
        self._collate: Callable[[Sequence[Sample]], dict[str, Any]] | None = None
        self._packed = packed
        self._answers = answers or _runs_on_answers(vlm)
        if packed:
            refuse_if_unpackable(vlm)
        if isinstance(items[0], Sample):
            self._collate = Collator.for_model(vlm, answers=self._answers)
            # those without an image come last, when all others are scored
            check_num_images(map(self._fed, items), vlm.family.objective)
            self._rows = _by_length(items, batch_size)
        else:
            self._rows = _cut(range(len(items)), batch_size if packed else 1)
        fingerprint = getattr(data, "fingerprint", None)
        self.fingerprints: dict[str, str] = {"data": fingerprint} if fingerprint else {}

    def padded(self) -> Batches:
        """Return the same samples as batches that are padded and never packed."""
        other = copy.copy(self)
        other._packed = False
        if self._collate is None:
            other._rows = _cut(range(len(self._items)), 1)
        return other

    def labelled(self) -> Batches:
        """Return the same samples as batches with answers, padded and never packed."""
        other = self.padded()
        other._answers = True
        if self._collate is not None:
            other._collate = Collator.for_model(self._vlm, answers=True)
        return other

    def check_compared(self) -> None:
        """Refuse batches of one sample for losses that tell the samples of a batch apart.

        Raises:
            ConfigError: the model's loss would be the same whatever it does.
        """
        if self._collate is not None:
            check_compares(self._vlm, max(map(len, self._rows)), len(self._items))

    def part(self, rank: int, world: int) -> Part:
        """Return the share of one of `world` processes: every world-th batch from `rank` on."""
        return Part(range(rank, len(self._rows), world), self._make)

    def _make(self, number: int) -> Batch:
        rows = self._rows[number]
        if self._collate is None:
            return self._from_ready(number, [dict(self._items[row]) for row in rows])
        samples = [self._fed(self._items[row]) for row in rows]
        ids = tuple(sample.id for sample in samples)
        images = tuple(sample.id for sample in samples for _ in sample.images)
        if not self._packed:
            return Batch(number, ids, images, self._collate(samples))
        singles = tuple(self._collate([sample]) for sample in samples)
        return Batch(number, ids, images, pack(self._vlm, singles), singles)

    def _fed(self, sample: Sample) -> Sample:
        return sample if self._answers else _question_only(sample)

    def _from_ready(self, number: int, ready: list[dict[str, Any]]) -> Batch:
        counts = [_num_samples(inputs) for inputs in ready]
        if not self._packed:
            names = tuple(f"{number}[{row}]" for row in range(counts[0]))
            return Batch(number, names, (), ready[0])
        for inputs, count in zip(ready, counts, strict=True):
            mask = inputs.get("attention_mask")
            if count != 1 or (mask is not None and not bool(mask.all())):
                raise DataError(
                    f"Ready data is packed from one unpadded sample each, but batch {number} has "
                    f"one of {count} rows with padding or more than one row. Use packed=False."
                )
        names = tuple(f"{number}[{row}]" for row in range(len(ready)))
        return Batch(number, names, (), pack(self._vlm, ready), tuple(ready))


class Part:
    """Batches of one process; the next one is made while the model works on this one."""

    def __init__(self, numbers: Sequence[int], make: Callable[[int], Batch]) -> None:
        """Take the numbers of the batches and what makes one."""
        self._numbers = numbers
        self._make = make

    def __len__(self) -> int:
        """Give the number of batches."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        """Make the batches in turn, one ahead."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as ahead:
            pending = [ahead.submit(self._make, number) for number in self._numbers[:1]]
            for following in (*self._numbers[1:], None):
                if not pending:
                    return
                batch = pending.pop().result()
                if following is not None:
                    pending.append(ahead.submit(self._make, following))
                yield batch


def _runs_on_answers(vlm: VLM) -> bool:
    # BLIP's decoder and that of T5 read the answer alone: without one they would not run at all.
    # CLIP and its like have no other text than the caption.
    if vlm.family.objective == "caption":
        return not getattr(vlm.model.config, "use_decoder_only_language_model", False)
    return vlm.family.objective != "chat"


def _num_samples(inputs: Mapping[str, Any]) -> int:
    for name in ("input_ids", "pixel_values"):
        if name in inputs:
            return int(inputs[name].shape[0])
    raise DataError(
        f"A batch with {', '.join(inputs) or 'nothing'} cannot be scored; it needs input_ids or "
        "pixel_values, as the model's forward takes them."
    )


def _by_length(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    # Samples of like length share a batch, so little is spent on padding; the longest come first,
    # so that a batch that does not fit into memory is the first one.
    def length(row: int) -> tuple[int, int]:
        sample = samples[row]
        return len(sample.images), sum(len(turn.text) for turn in sample.turns)

    order = sorted(range(len(samples)), key=length, reverse=True)
    return _cut(order, batch_size)


def _cut(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[first : first + size]) for first in range(0, len(rows), size)]


def _question_only(sample: Sample) -> Sample:
    """Cut a conversation before its first answer, and its images with it."""
    roles = [turn.role for turn in sample.turns]
    if "assistant" not in roles:
        return sample
    turns = sample.turns[: roles.index("assistant")]
    if not any(IMAGE_PLACEHOLDER in turn.text for turn in sample.turns):
        # all in front, for models that take one image and no place for it
        return replace(sample, turns=turns)
    num_images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    return replace(sample, turns=turns, images=sample.images[:num_images])
