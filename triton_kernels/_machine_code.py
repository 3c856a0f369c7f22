"""Looks through machine code for what a compiler got wrong: registers read before they are written.

ptxas 12.8 made matrix descriptors of a uniform register that nothing had written
(docs/decisions/0008), which no test without a GPU sees otherwise.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s+(.*?)\s*;")
_REGISTER = re.compile(r"\bUR(\d+)\b")
# results of two and of four registers
_WIDE = ((".128", 4), (".64", 2), (".WIDE", 2))


def unwritten(cubin: bytes, tools: Path) -> list[str]:
    """List the uniform arithmetic of a kernel that reads a register which nothing above it writes.

    Args:
        cubin: machine code of one kernel.
        tools: folder of cuobjdump and nvdisasm.
    """
    return unwritten_in(dump(cubin, "--dump-sass", tools))


def unwritten_in(sass: str) -> list[str]:
    """The same from machine code as text."""
    written: set[int] = set()
    found = []
    for match in map(_INSTRUCTION.match, sass.splitlines()):
        if match is None:
            continue
        operation, operands = match.groups()
        target, _, sources = operands.partition(",")
        if (
            operation.startswith("U")
            and not {int(n) for n in _REGISTER.findall(sources)} <= written
        ):
            found.append(f"{operation} {operands}")
        register = _REGISTER.fullmatch(target.strip())
        if register is not None:
            size = next((size for mark, size in _WIDE if mark in operation), 1)
            written |= set(range(int(register[1]), int(register[1]) + size))
    return found


def dump(cubin: bytes, what: str, tools: Path) -> str:
    """Let cuobjdump say something of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), what, file.name]
        environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return run.stdout
