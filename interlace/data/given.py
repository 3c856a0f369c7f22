"""What a caller hands over to run a model on: samples, or batches made already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from interlace.data.samples import Sample, Samples
from interlace.errors import DataError

# what every batch is made of, if it holds it at all
_TENSORS = ("input_ids", "pixel_values", "attention_mask", "labels")


def samples_or_batches(data: Any, what: str) -> Sequence[Any]:
    """Give data as a sequence of samples only, or of batches only.

    Args:
        data: samples, or batches that a model's forward takes as keyword arguments.
        what: what the data is called, such as "calibration data".

    Raises:
        DataError: it is something else, a single batch, empty, mixed, or not of tensors.
    """
    wanted = "give samples (see interlace.samples) or a list of batches of model inputs."
    items = _items(data, what, Sample | Mapping, wanted)
    if len({isinstance(item, Sample) for item in items}) > 1:
        raise DataError(f"The {what} holds samples and batches; give one of the two.")
    if isinstance(items[0], Mapping):
        for number, batch in enumerate(items):
            for name in _TENSORS:
                if not isinstance(batch.get(name), Tensor | None):
                    raise DataError(
                        f"In batch {number} of the {what}, {name} is a "
                        f"{type(batch[name]).__name__}; give tensors (return_tensors='pt')."
                    )
    return items


def as_samples(data: Any, what: str) -> Samples:
    """Give data as samples.

    Args:
        data: samples, or any other sequence or iterator of them.
        what: what the data is called, such as "calibration data".

    Raises:
        DataError: it is something else, or empty.
    """
    wanted = "give samples (see interlace.samples)."
    items = _items(data, what, Sample, wanted)
    return items if isinstance(items, Samples) else Samples(items)


def _items(data: Any, what: str, kinds: Any, wanted: str) -> Sequence[Any]:
    if isinstance(data, Mapping):
        raise DataError(f"The {what} is a single {type(data).__name__}; {wanted}")
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise DataError(f"The {what} is a {type(data).__name__}; {wanted}")
    items = data if isinstance(data, Sequence) else list(data)
    if not items:
        raise DataError(f"The {what} holds no sample; {wanted}")
    odd = next((item for item in items if not isinstance(item, kinds)), None)
    if odd is not None:
        raise DataError(f"The {what} holds a {type(odd).__name__}; {wanted}")
    return items
