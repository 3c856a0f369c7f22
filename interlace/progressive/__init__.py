"""Progressive pruning: a few layers at a time, each time scored and healed again.

It stands above the stages of the flow, as the pipeline does, and calls their verbs.
"""

from __future__ import annotations

from interlace.progressive.stages import Stage
from interlace.progressive.verb import ProgressiveResult, progressive

__all__ = ["ProgressiveResult", "Stage", "progressive"]
