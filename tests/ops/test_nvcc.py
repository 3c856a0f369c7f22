"""CUDA kernels compile for the GPU generations in use, within their registers, without spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# two blocks of 256 threads fit on a multiprocessor
MOST_REGISTERS = 128
# its sums live in registers: two or three blocks of 128 threads, whose copies run ahead by
# themselves, keep a multiprocessor busy
MORE_REGISTERS = {"layer_similarity": 255}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", f"-I{ROOT / 'csrc'}"]
    command += ["-Xptxas=-v", "-cubin", str(source), "-o", str(tmp_path / "out.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pattern = r"Function properties for (\S+)\n(.*)\n.*Used (\d+) registers"
    kernels = re.findall(pattern, result.stderr)
    assert kernels, result.stderr
    for name, properties, registers in kernels:
        assert "0 bytes stack frame, 0 bytes spill stores" in properties, f"{name}: {properties}"
        most = MORE_REGISTERS.get(source.stem, MOST_REGISTERS)
        assert int(registers) <= most, f"{name} uses {registers} registers"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_later_gpus_take_what_is_built_for_any(tmp_path: Path) -> None:
    listed = re.search(r"^ARCHITECTURES = \((.*)\)$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert listed is not None
    # the PTX that is built is of any of them: the newest that a compiler knows
    *architectures, newest = re.findall(r'"(\w+)"', listed[1])
    source = tmp_path / "nothing.cu"
    source.write_text("__global__ void nothing() {}\n")
    for each in architectures:
        command = ["nvcc", f"-gencode=arch=compute_{each},code=sm_{newest}", "-cubin", str(source)]
        command += ["-o", str(tmp_path / "out.cubin")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
