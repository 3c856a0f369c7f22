"""The seeded, unbiased choice of samples from a source, with every image looked at once."""

from __future__ import annotations

import functools
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from interlace._progress import bar
from interlace.data.sample_texts import check_placeholders
from interlace.data.samples import TASKS, Sample, Samples
from interlace.data.schemas import as_task
from interlace.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.data.chat import ChatText
    from interlace.data.samples import RecordReader

logger = logging.getLogger(__name__)

_NAMED_IN_ERRORS = 5
_CHUNK = 256
_CHECK_THREADS = 4


class SampleList:
    """Samples that the caller made."""

    def __init__(self, items: Sequence[Sample]) -> None:
        wrong = next((item for item in items if not isinstance(item, Sample)), None)
        if wrong is not None:
            raise DataError(
                f"A sequence with a {type(wrong).__name__} is no source of samples; give Sample "
                "objects, or the name of a file, folder or data set."
            )
        for item in items:
            # models that take no place for an image need none named
            check_placeholders(item.turns, len(item.images), f"Sample {item.id!r}", optional=True)
        self.name = items.source if isinstance(items, Samples) else "memory"
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> Sample:
        """Give sample `index` as it is."""
        return self._items[index]


def take(
    reader: RecordReader,
    count: int | None,
    fraction: float | None,
    seed: int,
    tasks: Sequence[str] | None,
    max_bad_fraction: float,
    processor: Any = None,
) -> tuple[list[Sample], int]:
    """Walk the records in seeded order until enough good ones are found."""
    refused = functools.partial(_problem, chat=_chat_of(processor))
    total = len(reader)
    order: Sequence[int] = range(total)
    wanted = total
    if count is not None or fraction is not None:
        # A permutation, so that a bad record is replaced by the next one in the same order.
        order = random.Random(seed).sample(order, total)
        wanted = min(total, count or max(1, int(total * (fraction or 1.0) + 1e-9)))
    if count is not None and count > total:
        logger.warning("%s has %d records, fewer than the %d wanted", reader.name, total, count)
    allowed = int(max_bad_fraction * wanted + 1e-9)
    waiting = iter(order)
    good: list[Sample] = []
    bad: list[str] = []
    with bar("Checking images", wanted) as advance, ThreadPoolExecutor(_CHECK_THREADS) as pool:
        while len(good) < wanted:
            places = list(islice(waiting, min(_CHUNK, wanted - len(good))))
            if not places:
                break
            drawn = []
            for index in places:
                try:
                    drawn.append(reader.read(index))
                except DataError as error:
                    bad.append(str(error))
            fitting = [sample for sample in (as_task(item, tasks) for item in drawn) if sample]
            if count is None:
                # A fraction is one of all records; only bad ones are replaced.
                wanted -= len(drawn) - len(fitting)
            for sample, problem in zip(fitting, pool.map(refused, fitting), strict=True):
                if problem:
                    bad.append(problem)
                else:
                    good.append(sample)
                    advance()
            if len(bad) > allowed:
                raise _too_many_bad(reader.name, bad, allowed, max_bad_fraction)
    if not good:
        if bad:
            others = f", and no other one serves the tasks {', '.join(tasks)}" if tasks else ""
            raise DataError(
                f"{reader.name}: no sample is left, since {len(bad)} cannot be used{others}. "
                f"{_listed(bad)}. Repair these, or give another source."
            )
        raise DataError(
            f"{reader.name}: none of its {total} records serves the tasks "
            f"{', '.join(tasks or TASKS)}; choose others with tasks=."
        )
    if bad:
        logger.warning(
            "%s: skipped %d samples that cannot be used, first: %s", reader.name, len(bad), bad[0]
        )
    return good, len(bad)


def _chat_of(processor: Any) -> ChatText | None:
    """What renders questions for the model; None where that is not known, or takes no template."""
    if processor is None:
        return None
    # needs jinja2, which data sets read for no model do without
    from interlace.data.chat import ChatText

    chat = ChatText(processor)
    return chat if chat.has_format else None


def _problem(sample: Sample, chat: ChatText | None) -> str | None:
    try:
        if chat is not None:
            chat.prompt(sample)
        for image in sample.images:
            image.open()
    except DataError as error:
        return str(error)
    return None


def _too_many_bad(name: str, bad: Sequence[str], allowed: int, fraction: float) -> DataError:
    advice = ", or raise max_bad_fraction" if fraction < 1 else ""
    return DataError(
        f"{name}: {len(bad)} samples that cannot be used so far, {allowed} allowed "
        f"(max_bad_fraction={fraction}). {_listed(bad)}. Repair or remove them{advice}."
    )


def _listed(bad: Sequence[str]) -> str:
    # records may share an image
    named = [each.rstrip(".") for each in dict.fromkeys(bad)]
    rest = len(named) - _NAMED_IN_ERRORS
    return "; ".join(named[:_NAMED_IN_ERRORS]) + (f"; and {rest} more" if rest > 0 else "")
