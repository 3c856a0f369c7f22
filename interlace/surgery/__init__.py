"""Surgery: taking layers out of a model, as a transaction.

`prune` is loaded on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlace.surgery.depth import prune

__all__ = ["prune"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from interlace.surgery import depth

    return getattr(depth, name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
