"""The tiny cases of every op on every backend, for pytest-benchmark: pytest bench --benchmark-only.

For a quick look on the CPU, and for comparing two commits (--benchmark-autosave, then
--benchmark-compare). Figures worth quoting come from run.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from interlace.microbenchmarks.case import Setup
from interlace.microbenchmarks.registry import cases_of, timed_ops
from interlace.microbenchmarks.shapes import SHAPES
from interlace.ops._selection import ORDER

if TYPE_CHECKING:
    from interlace.microbenchmarks.case import Case
    from interlace.ops._registry import Op


def tiny_cases() -> list[Any]:
    found = []
    for op in timed_ops().values():
        cases = cases_of(op.name)
        if isinstance(cases, str):
            found.append(pytest.param(op, None, id=op.name, marks=pytest.mark.skip(reason=cases)))
            continue
        setup = Setup.seeded(torch.device("cpu"), torch.float32, quick=True)
        found += [
            pytest.param(op, case, id=f"{op.name}-{case.name}")
            for case in cases(SHAPES["tiny"], setup)
        ]
    return found


@pytest.mark.parametrize("backend", ORDER)
@pytest.mark.parametrize(("op", "case"), tiny_cases())
def test_tiny(op: Op, case: Case, backend: str, benchmark: Any) -> None:
    reasons = {**dict(op.explain(*case.args)), **case.left_out}
    if reasons[backend] is not None:
        pytest.skip(reasons[backend])
    benchmark.group = f"{op.name} {case.name}"
    benchmark(op, *case.args, backend=backend)
