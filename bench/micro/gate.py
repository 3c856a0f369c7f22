"""No op is timed while its contract test is red."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace.ops._check import violations

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from interlace.ops._registry import Op


def contract_violations(op: Op, device: torch.device, dtypes: Collection[torch.dtype]) -> list[str]:
    """Run the contract test of an op and of its backward on a device, in the dtypes to be timed.

    Returns:
        One sentence per violation, by dtype and sample; none if the op may be timed.
    """
    found = []
    for part in (op, op.backward.op) if op.backward else (op,):
        for dtype in part.dtypes:
            if dtype not in dtypes:
                continue
            for sample in part.samples(device, dtype):
                where = f"{part.name}, {str(dtype).removeprefix('torch.')}, sample {sample.name}"
                try:
                    broken = violations(part, sample.args)
                # a backend that raises breaks the contract, whatever it raises
                except Exception as error:  # noqa: BLE001
                    broken = [f"raised {first_line(error)}"]
                found += [f"{where}: {each}" for each in broken]
    return found


def first_line(error: BaseException) -> str:
    """Word an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
