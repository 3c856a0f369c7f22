"""Evaluation: what a model can still do, how close it stays to its teacher, how fast it is.

`evaluate` is loaded on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlace.evaluate.runner import TASKS, evaluate

__all__ = ["TASKS", "evaluate"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from interlace.evaluate import runner

    return getattr(runner, name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
