"""Evaluating a model on fused kernels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from interlace.evaluate import evaluate

if TYPE_CHECKING:
    from interlace.models import VLM
    from interlace.records import EvalReport


def evaluate_fused(vlm: VLM, **options: Any) -> EvalReport:
    """Fuse a model, measure it, and undo the fusing; a baseline is measured as it is.

    Args:
        vlm: the model; not fused yet.
        options: those of `interlace.evaluate`.

    Returns:
        The report; `details["fused"]` holds, line by line, what ran on which backend.

    Raises:
        InterlaceError: as `fuse` and `evaluate` raise it.
    """
    # loads transformers' modelling code, which other runs do without
    from interlace.nn import fuse, unfuse

    fusion = fuse(vlm)
    try:
        report = evaluate(vlm, **options)
    finally:
        unfuse(vlm)
    return dataclasses.replace(report, details={**report.details, "fused": str(fusion).split("\n")})
