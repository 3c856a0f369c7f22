"""Compiles the Triton kernels ahead of time, without a GPU, and reports what they use.

    python -m interlace.triton_kernels.aot [--capability 90] [--json] [OP ...]

Every variant of every kernel is compiled to machine code with the compiler that triton brings; the
report gives registers, stack (more than 0 means that registers were spilled) and shared memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import interlace.triton_kernels as kernels
from interlace.triton_kernels import _machine_code
from interlace.triton_kernels._variants import SHARED_LIMIT, Variant

if TYPE_CHECKING:
    from collections.abc import Iterator

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Resources:
    """What one variant uses on one GPU generation.

    Attributes:
        op: module of the kernel.
        variant: name of the variant.
        capability: compute capability, 80, 90 or 100.
        registers: per thread.
        stack: bytes per thread; 0 unless registers were spilled.
        shared: bytes of shared memory per block.
        missing: expected instructions that the PTX lacks.
        unwritten: machine instructions of matrix products for Hopper that read what none writes.
    """

    op: str
    variant: str
    capability: int
    registers: int
    stack: int
    shared: int
    missing: tuple[str, ...]
    unwritten: tuple[str, ...]

    def faults(self) -> list[str]:
        """Say in words what is wrong with it; empty if nothing is."""
        found = [f"its PTX has no {part}" for part in self.missing]
        found += [f"its machine code reads what it never wrote: {each}" for each in self.unwritten]
        if self.stack:
            found.append(f"it spills {self.stack} bytes of registers")
        if self.shared > SHARED_LIMIT[self.capability]:
            found.append(f"it needs {self.shared} bytes of shared memory")
        return found


def modules() -> list[str]:
    """Names of the kernel modules, one per op."""
    names = (module.name for module in pkgutil.iter_modules(kernels.__path__))
    return sorted(name for name in names if not name.startswith("_") and name != "aot")


def variants(op: str) -> list[Variant]:
    """The variants of one kernel module."""
    found: list[Variant] = importlib.import_module(f"interlace.triton_kernels.{op}").variants()
    return found


def build(op: str, variant: Variant, capability: int) -> Any:
    """Compile one variant for one GPU generation; triton's compiled kernel, with its `asm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    unknown = (set(variant.types) | set(variant.constants) | set(variant.aligned)) - set(names)
    left_out = set(names) - set(variant.types) - set(variant.constants)
    if unknown or left_out:
        raise ValueError(
            f"Variant {variant.name!r} of {op} names {sorted(unknown)}, not in its kernel, and "
            f"leaves out {sorted(left_out)}."
        )
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": variant.fp_fusion,
        },
    )


def compile_variant(op: str, variant: Variant, capability: int) -> Resources:
    """Compile one variant for one GPU generation, and say what it uses."""
    compiled = build(op, variant, capability)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    registers, stack = _usage(cubin)
    # the products whose operands are described by uniform registers
    unwritten = _machine_code.unwritten(cubin, _tools()) if "wgmma" in ptx else []
    return Resources(
        op=op,
        variant=variant.name,
        capability=capability,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        missing=tuple(part for part in variant.expects.get(capability, ()) if part not in ptx),
        unwritten=tuple(unwritten),
    )


def _tools() -> Path:
    """The folder of the CUDA tools that triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    text = _machine_code.dump(cubin, "--dump-resource-usage", _tools())
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump reports no resources: {text!r}")
    return int(found[1]), int(found[2])


def compile_all(ops: list[str], capabilities: tuple[int, ...]) -> Iterator[Resources]:
    """Compile every variant of the given modules."""
    for op in ops:
        for variant in variants(op):
            for capability in capabilities:
                if capability in variant.capabilities:
                    yield compile_variant(op, variant, capability)


def main() -> None:
    """Command line; exit status 1 if a variant has a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", choices=[[], *modules()], metavar="OP")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    arguments = parser.parse_args()
    failed = False
    found = compile_all(arguments.ops or modules(), tuple(arguments.capability or CAPABILITIES))
    for one in found:
        faults = one.faults()
        failed |= bool(faults)
        if arguments.json:
            line = json.dumps(dataclasses.asdict(one) | {"faults": faults})
        else:
            line = (
                f"{one.op:18} sm_{one.capability:<4} {one.variant:48} {one.registers:4} registers "
                f"{one.shared:7} B shared  {'; '.join(faults) or 'ok'}"
            )
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    sys.exit(failed)


if __name__ == "__main__":
    main()
