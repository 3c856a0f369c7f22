"""Triton kernels compile for every GPU generation without spills, to the expected instructions."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from interlace.triton_kernels import aot


@functools.cache
def compiled(op: str) -> list[dict[str, object]]:
    # a process of its own: this one interprets kernels
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "interlace.triton_kernels.aot", "--json", op]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
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
