"""The rules of the layout: short files, documented public names, one stem per op."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import interlace

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "interlace"
LONGEST = {"interlace": 400, "tests": 400, "bench": 400, "csrc": 600, "triton_kernels": 600}
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h"}


def modules() -> list[str]:
    """All modules whose path has no leading underscore."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return names


@pytest.mark.parametrize("folder", LONGEST)
def test_files_are_short_enough_to_hold_in_mind(folder: str) -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES
    }
    assert {path: n for path, n in lengths.items() if n > LONGEST[folder]} == {}


@pytest.mark.parametrize("name", interlace.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(interlace, name)
    if name != "__version__":
        assert inspect.getdoc(value), f"interlace.{name} has no docstring"


@pytest.mark.parametrize("module", modules())
def test_modules_say_what_they_hold_and_keep_their_promises(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__doc__, f"{module} has no docstring"
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name), f"{module}.__all__ names {name}, which does not exist"


def test_every_op_is_public_and_every_kernel_belongs_to_an_op() -> None:
    ops = {path.stem for path in (PACKAGE / "ops").glob("[!_]*.py")}
    for op in ops:
        assert callable(getattr(interlace.ops, op)), f"import {op} in interlace/ops/__init__.py"
        assert importlib.import_module(f"interlace.ops.{op}").OP.name == op
    shared = {"aot", "common", "dtype", "isa", "lanes", "parallel", "ptx", "scalar", "vector"}
    for path in [*(ROOT / "csrc").glob("*/*.*"), *(ROOT / "triton_kernels").glob("[!_]*.py")]:
        belongs = any(path.stem == op or path.stem.startswith(f"{op}_") for op in ops)
        assert belongs or path.stem in shared, f"{path.relative_to(ROOT)} has no op of that name"


def test_no_version_has_a_heading_twice_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for version in text.split("\n## ")[1:]:
        headings = [line for line in version.splitlines() if line.startswith("### ")]
        assert len(headings) == len(set(headings)), version.splitlines()[0]
