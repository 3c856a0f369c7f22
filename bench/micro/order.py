"""Which backend of an op is fastest on a GPU: measured here, read by interlace.ops."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from interlace._files import atomic_write_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from interlace.microbenchmarks.measure import Record
    from interlace.ops._registry import Op


def measured_order(op: Op, records: Iterable[Record]) -> dict[str, list[str]]:
    """Order an op's kernels by the geometric mean of their medians, fastest first.

    Only cases that all of an op's timed kernels served count, so that no kernel wins by serving
    the small ones alone. The backward is an op of its own with an order of its own. The reference
    is not part of the order: it comes last in any case.

    Returns:
        Name of the op, or of its backward, -> names of backends; without an entry where no case
        was served by all.
    """
    medians: dict[str, list[dict[str, float]]] = {}
    for record in records:
        backward = record["direction"] == "backward"
        name = op.backward.op.name if backward and op.backward else op.name
        medians.setdefault(name, []).append(
            {
                row["name"]: row["median_ms"]
                for row in record["rows"]
                if row["is_backend"] and row["name"] != "torch"
            }
        )
    found = {}
    for name, cases in medians.items():
        kernels = sorted(set().union(*cases))
        shared = [case for case in cases if set(kernels) <= set(case)]
        if kernels and shared:
            found[name] = sorted(
                kernels,
                key=lambda kernel, shared=shared: math.fsum(
                    math.log(case[kernel]) for case in shared
                ),
            )
    return found


def update_order(path: Path, device_name: str, order: dict[str, list[str]]) -> None:
    """Put the orders of some ops on one device into the file, and keep all others."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known.setdefault(device_name, {}).update(order)
    atomic_write_text(path, json.dumps(known, indent=2, sort_keys=True) + "\n")
