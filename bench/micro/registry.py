"""Which ops there are, and where their cases lie."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import interlace.ops  # noqa: F401  registers all ops
from interlace.ops._registry import OPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from interlace.microbenchmarks.case import Case, Setup
    from interlace.microbenchmarks.shapes import ModelShape
    from interlace.ops._registry import Op

_FOLDER = Path(__file__).parent / "cases"


def timed_ops() -> dict[str, Op]:
    """Name all ops but those that are the backward of another, which is timed with it."""
    backwards = {op.backward.op.name for op in OPS.values() if op.backward}
    return {name: op for name, op in OPS.items() if name not in backwards}


def cases_of(op_name: str) -> Callable[[ModelShape, Setup], Iterator[Case]] | str:
    """Return the function that yields an op's cases, or say that there is none."""
    if not (_FOLDER / f"{op_name}.py").is_file():
        return f"has no cases: interlace.microbenchmarks has no cases/{op_name}.py"
    return importlib.import_module(f"interlace.microbenchmarks.cases.{op_name}").cases
