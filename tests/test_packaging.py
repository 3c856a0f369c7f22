"""What pip makes of the repository: contents of the wheel, the folder mapping, no compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PARTS = ("csrc", "interlace", "triton_kernels", "bench/micro")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
LEFT_OUT = ("__pycache__", "*.so", "*.pyc")


@pytest.fixture(scope="module")
def checkout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for file in FILES:
        shutil.copy(root / file, copy / file)
    nested = copy / "interlace" / "assets" / "some_model" / "inner"
    nested.mkdir(parents=True)
    (nested / "weights.safetensors").write_bytes(b"0")
    return copy


def build(checkout: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    shutil.rmtree(checkout / "build", ignore_errors=True)
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "-v", "-w", str(target)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "."],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    result = build(checkout, target, INTERLACE_EXTENSION="skip")
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path with the wheel's contents."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(
    script: str, *, path: list[Path], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    # without the site module no .pth file is read, so an editable install of the checkout cannot
    # stand in for what the wheel lacks
    packages = sysconfig.get_path("purelib")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), packages])}
    return subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "interlace = interlace.cli:main" in archive.read(entry_points).decode()
    assert wheel.name.startswith("interlace_vlm-")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "interlace/triton_kernels/__init__.py" in names
    expected = {
        path.relative_to(checkout).as_posix()
        for path in (checkout / "interlace").rglob("*")
        if path.is_file()
    }
    assert "interlace/py.typed" in expected
    assert "interlace/assets/some_model/inner/weights.safetensors" in expected
    assert expected <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"interlace", "interlace_vlm"}


def test_without_the_extension_everything_runs_on_torch(installed: Path, tmp_path: Path) -> None:
    script = (
        "import torch, interlace\n"
        "assert 'was not built' in interlace.ops.doctor()['extension']\n"
        "groups = torch.zeros(3, dtype=torch.int32)\n"
        "interlace.ops.layer_similarity(torch.ones(2, 3, 4), groups, num_groups=1)\n"
        "print(interlace.__file__)\n"
    )
    result = python(script, path=[installed], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(installed) in result.stdout


def test_triton_kernels_exists_under_the_package_only(installed: Path, tmp_path: Path) -> None:
    script = (
        "import importlib.util, sys\n"
        "assert importlib.util.find_spec('triton_kernels') is None\n"
        "import interlace.triton_kernels\n"
        "assert 'triton' not in sys.modules\n"
    )
    result = python(script, path=[installed], cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_microbenchmarks_are_installed(installed: Path, tmp_path: Path) -> None:
    script = (
        "from interlace.cli import main\n"
        "import sys\n"
        "sys.argv = ['interlace', 'bench', 'silu_mul', '--device', 'cpu', '--shapes', 'tiny', "
        "'--quick']\n"
        "main()\n"
    )
    result = python(script, path=[installed], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    # no checkout to write to
    (written,) = tmp_path.rglob("*.jsonl")
    assert written.parent == tmp_path / "interlace-bench/cpu"


def test_source_folder_refuses_the_name_of_another_package(checkout: Path) -> None:
    result = python("import triton_kernels", path=[], cwd=checkout)
    assert "ImportError: imported as 'triton_kernels'" in result.stderr
    assert "pip install -e ." in result.stderr


def test_package_of_the_same_name_keeps_working_beside_ours(
    installed: Path, tmp_path: Path
) -> None:
    other = tmp_path / "triton_kernels"
    other.mkdir()
    (other / "__init__.py").write_text("origin = 'other'\n")
    script = (
        "import triton_kernels, interlace.triton_kernels\n"
        "assert triton_kernels.origin == 'other'\n"
        "assert not hasattr(interlace.triton_kernels, 'origin')\n"
    )
    result = python(script, path=[installed, tmp_path], cwd=tmp_path / "triton_kernels")
    assert result.returncode == 0, result.stderr


def test_compiler_that_fails_costs_one_line_unless_it_is_required(
    checkout: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pybind11")
    broken = {"CC": "false", "CXX": "false"}
    result = build(checkout, tmp_path, **broken)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (result.stdout + result.stderr).splitlines()
    said = [line for line in lines if "installing without compiled kernels" in line]
    assert len(said) == 1
    assert "every op runs on its torch backend" in said[0]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    required = build(checkout, tmp_path / "required", INTERLACE_EXTENSION="require", **broken)
    assert required.returncode != 0


def test_unknown_build_switch_is_refused(checkout: Path, tmp_path: Path) -> None:
    result = build(checkout, tmp_path, INTERLACE_EXTENSION="maybe")
    assert result.returncode != 0
    assert "expected 'auto', 'require' or 'skip'" in result.stdout + result.stderr


def test_older_compilers_know_what_they_are_asked_about_processors(root: Path) -> None:
    # of a name that a compiler does not know it is an error to ask: "f16c" for Clang before 18
    known = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"}
    text = "".join(path.read_text() for path in sorted((root / "csrc").rglob("*.[ch]*")))
    asked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', text))
    assert asked
    assert asked <= known
