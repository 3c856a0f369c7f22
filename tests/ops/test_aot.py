"""Triton kernels compile for every GPU generation without spills, to the expected instructions."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from interlace.triton_kernels import _machine_code, aot


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # a process of its own: this one interprets kernels
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@functools.cache
def compiled(op: str) -> list[dict[str, object]]:
    result = run("-m", "interlace.triton_kernels.aot", "--json", op)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines, result.stderr
    assert not result.stderr.count("Traceback"), result.stderr
    return lines


@pytest.mark.parametrize("op", aot.modules())
def test_every_variant_compiles_without_spills(op: str) -> None:
    faults = {
        f"{one['variant']} on sm_{one['capability']}": one["faults"]
        for one in compiled(op)
        if one["faults"]
    }
    assert not faults
    assert {one["capability"] for one in compiled(op)} == set(aot.CAPABILITIES)


GROWING = """
from interlace.ops._ragged_decode_plan import num_splits
from interlace.triton_kernels import ragged_decode as op
for kernel in (op.attend_kernel, op.join_kernel):
    forms = set()
    for capacity in range(700, 5000):
        splits = num_splits(4, capacity, 65536, op.torch.device("cpu"))
        sizes = {"capacity": capacity, "num_splits": splits, "num_stats": 28 * splits}
        sizes["stats"] = 128 * sizes["num_stats"]
        told = [p.name for p in kernel.params if not p.do_not_specialize and p.name in sizes]
        forms.add(tuple((sizes[name] == 1, sizes[name] % 16 == 0) for name in told))
    print(len(forms))
"""


def test_a_growing_cache_needs_one_kernel() -> None:
    result = run("-c", GROWING)
    assert result.stdout.split() == ["1", "1"], result.stderr


def test_a_register_that_nothing_writes_is_found() -> None:
    lines = (
        "/*0000*/  ULDC.64 UR6, c[0x0][0x258] ;  /* 0x00009600000679b9 */",
        "/*0010*/  @!P0 R2UR UR8, R3 ;",
        "/*0020*/  UIADD3 UR9, UP0, UR7, 0x20, URZ ;",
        "/*0030*/  UIMAD.WIDE.U32 UR4, UR6, UR8, UR6 ;",
        "/*0040*/  UIADD3.X UR5, UR5, UR22, URZ, UP0, !UPT ;",
        "/*0050*/  UMOV UR22, 0x400 ;",
        "/*0060*/  UIADD3 UR22, UR22, 0x20, URZ ;",
    )
    assert _machine_code.unwritten_in("\n".join(lines)) == [
        "UIADD3.X UR5, UR5, UR22, URZ, UP0, !UPT"
    ]
