"""Evaluation: what a model can still do, how close it stays to its teacher, how fast it is.

`evaluate` is loaded on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace._lazy import lazy_names

if TYPE_CHECKING:
    from interlace.evaluate.runner import TASKS, evaluate

__all__ = ["TASKS", "evaluate"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "TASKS": "runner",
        "evaluate": "runner",
    },
)
