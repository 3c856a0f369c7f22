"""Imports point downstream only, and importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "interlace"
STAGES = ("scores", "plan", "surgery", "heal", "evaluate", "export")
# small modules without a layer of their own
BASE = (
    "errors", "records", "config", "_settings", "_heal_settings", "_records", "_coerce", "_files",
    "_launch", "_lazy", "_progress", "_torch_utils",
)  # fmt: skip
# what a unit may import beside itself; units that are not named see everything below them
ALLOWED = {
    "errors": (),
    "ops": ("errors",),
    "records": ("errors", "_records", "_coerce", "_files"),
    "_records": ("errors", "_coerce", "_files"),
    "_settings": ("errors", "_coerce"),
    "_heal_settings": ("errors", "_settings", "_coerce"),
    "config": ("errors", "_settings", "_heal_settings", "_coerce", "_files"),
    "data": BASE,
    "bundled": ("errors",),
    "models": (*BASE, "ops", "bundled"),
    "nn": ("errors", "_torch_utils", "ops", "models"),
    **dict.fromkeys(STAGES, (*BASE, "ops", "models", "data")),
    "plan": ("errors", "records", "_records", "config", "_settings", "_files", "_progress"),
}
WITHOUT_TORCH = (
    "errors", "records", "_records", "config", "_settings", "_heal_settings", "plan"
)  # fmt: skip
# the scripts that train the bundled models stand above everything, unlike the package they lie in
SCRIPTS = ("bundled.build", "bundled.train")


def units() -> dict[str, list[Path]]:
    """Every module or package right under interlace, with its files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found.setdefault(unit_of(name), []).append(path)
    return found


def unit_of(name: str) -> str:
    """Unit of a module, given its name under interlace."""
    return "bundled scripts" if name in SCRIPTS else name.split(".")[0]


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names.add(node.module or "")
            if node.module == "interlace":
                names.update(f"interlace.{alias.name}" for alias in node.names)
    return names


def imported_units(path: Path) -> set[str]:
    names = (
        name.removeprefix("interlace.") for name in imports(path) if name.startswith("interlace.")
    )
    return {unit_of(name) for name in names}


@pytest.mark.parametrize("unit", sorted(set(ALLOWED) & set(units())))
def test_units_import_only_what_they_may(unit: str) -> None:
    for path in units()[unit]:
        beyond = imported_units(path) - {unit, *ALLOWED[unit]}
        assert not beyond, f"{path.relative_to(PACKAGE)} imports {sorted(beyond)}"


def test_no_circle_of_units() -> None:
    graph = {
        unit: set().union(*(imported_units(path) for path in paths)) - {unit}
        for unit, paths in units().items()
        if unit != "__init__"
    }
    while graph:
        leaves = {unit for unit, used in graph.items() if not used & set(graph)}
        assert leaves, f"these import each other: {graph}"
        graph = {unit: used for unit, used in graph.items() if unit not in leaves}


@pytest.mark.parametrize("unit", WITHOUT_TORCH)
def test_records_and_plans_need_no_torch(unit: str) -> None:
    for path in units()[unit]:
        heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}
        assert not heavy, f"{path.relative_to(PACKAGE)} imports {sorted(heavy)}"


def modules_after(statement: str) -> set[str]:
    """First names of all modules that are loaded after a statement in a fresh interpreter."""
    script = (
        f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import interlace", {"torch", "transformers", "triton", "numpy"}),
        ("from interlace import Plan, Scores, make_plan, errors", {"torch", "transformers"}),
        ("import interlace.ops", {"transformers", "triton"}),
    ],
)
def test_imports_stay_lean(statement: str, absent: set[str]) -> None:
    loaded = modules_after(statement)
    assert "interlace" in loaded
    assert not loaded & absent


def test_importing_does_not_touch_cuda() -> None:
    modules_after("import torch, interlace.ops\nassert not torch.cuda.is_initialized()")


def test_verbs_stay_functions_when_packages_of_the_same_name_are_imported() -> None:
    modules_after(
        "import interlace, interlace.heal, interlace.evaluate, interlace.export\n"
        "assert callable(interlace.heal) and callable(interlace.evaluate)\n"
        "from interlace.export import export\n"
        "assert interlace.export is export\n"
        "import interlace.heal.trainer as one, interlace.evaluate.speed as two\n"
        "import interlace.export.verify as three, interlace.progressive.loss as four\n"
        "assert [each.__name__.count('.') for each in (one, two, three, four)] == [2] * 4\n"
    )
