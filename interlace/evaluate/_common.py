"""What every evaluation task shares: settings, results, batches, a model held still."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from interlace._torch_utils import inference
from interlace.data.collate import processor_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from interlace.data.samples import Sample
    from interlace.models.handle import VLM


@dataclass(frozen=True)
class Options:
    """Settings of one evaluation.

    Attributes:
        batch_size: samples per batch, at least 1. No quality metric depends on it.
        max_new_tokens: longest answer in tokens, at least 1.
        whose: added to what progress bars say, such as " (baseline)".
    """

    batch_size: int = 16
    max_new_tokens: int = 64
    whose: str = ""


@dataclass(frozen=True)
class TaskResult:
    """What one task measured on one model.

    Attributes:
        metrics: name -> value; fractions in 0..1 unless the task says otherwise.
        details: everything needed to read the metrics (counts, conventions, examples), JSON-able.
    """

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


def batches(samples: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    """Cut samples into lists of `batch_size`, the last one shorter."""
    return [
        [samples[index] for index in range(start, min(start + batch_size, len(samples)))]
        for start in range(0, len(samples), batch_size)
    ]


@contextlib.contextmanager
def held_still(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; every module's own mode afterwards."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(inference(model))
        yield


def tokenizer_of(vlm: VLM) -> Any:
    """Give the tokenizer of the model's processor (or the processor itself if it is one)."""
    processor = processor_of(vlm)
    return getattr(processor, "tokenizer", processor)
