"""Pruning and healing on the command line: options, and checkpoints of an earlier run."""

from __future__ import annotations

import importlib
import shutil
from typing import TYPE_CHECKING

import pytest

from interlace.errors import InterlaceError

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.config import HealSettings, Recipe

HEAL = ("--count", 4, "--max-steps", 2, "--batch-size", 4, "--learning-rate", 1e-4)


class _OpenedError(InterlaceError):
    """Stands for the first work that is not a check of what is given."""


@pytest.fixture
def planned(interlace, tmp_path: Path) -> Path:
    scores, plan = tmp_path / "scores.json", tmp_path / "plan.json"
    count = ("--count", 4, "--tower", "text")
    assert interlace("score", "bundled:clip", "-o", scores, *count)[0] == 0
    assert interlace("plan", scores, "-o", plan, "--num-drop", 1)[0] == 0
    return plan


def test_a_student_that_is_exported_again_keeps_its_records_and_the_name_of_the_dense_model(
    interlace, planned: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert interlace("prune", "bundled:clip", planned, "-o", first)[0] == 0
    # what another tool calls so is no record
    (first / "eval.json").write_text('{"accuracy": 1.0}')
    scores = tmp_path / "scores.json"
    code, _, error = interlace("export", first, again, "--record", scores)
    assert code == 0, error
    for name in ("plan.json", "scores.json"):
        assert (again / name).read_text() == (tmp_path / name).read_text()
    assert not (again / "eval.json").exists()
    card, before = ((folder / "README.md").read_text() for folder in (again, first))
    assert "# bundled:clip, pruned" in card
    layers = [text.split("## Layers")[1].split("## Loading")[0] for text in (card, before)]
    assert layers[0] == layers[1]


def test_the_weight_of_hidden_states_reaches_healing(
    interlace, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def healing(*_: object, settings: HealSettings, **__: object) -> None:
        given.append((settings.hidden_weight, settings.kl_weight))
        raise _OpenedError("opened")

    monkeypatch.setattr(importlib.import_module("interlace.heal"), "heal", healing)
    call = ("heal", "bundled:clip", planned, "-o", tmp_path / "out", *HEAL)
    for options in ((), ("--hidden-weight", 20), ("--no-distil",)):
        assert interlace(*call, *options)[2].endswith("Error: opened\n")
    assert given == [(1.0, 1.0), (20.0, 1.0), (0.0, 0.0)]
    code, _, error = interlace(*call, "--no-distil", "--hidden-weight", 20)
    assert code == 2
    assert "--hidden-weight 20 learns from the dense model" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--data", "scenes"),
        ("--root", "there"),
        ("--split", "test"),
        ("--count", 512),
        ("--max-bad-fraction", 0.5),
        ("--seed", 0),
    ],
)
def test_without_bridges_no_option_says_which_data(
    interlace, tmp_path: Path, option: str, value: object
) -> None:
    call = ("prune", "bundled:clip", tmp_path / "plan.json", "-o", tmp_path / "out", option, value)
    code, _, error = interlace(*call)
    assert code == 2
    assert error.startswith(f"Error: {option} given, but data is read only to fit bridges")
    assert "read only" not in interlace(*call, "--bridges", "fold")[2]


def test_the_seed_of_progressive_is_that_of_all_its_draws(
    interlace, recipes: list[Recipe], tmp_path: Path
) -> None:
    call = ("progressive", "bundled:clip", "-o", tmp_path / "out")
    for options in ((), ("--seed", 7)):
        assert interlace(*call, *options)[2] == "Error: opened\n"
    seeds = [(each.data.seed, each.plan.seed, each.heal.seed, each.eval.seed) for each in recipes]
    assert seeds == [(0, 42, 42, 0), (7, 7, 7, 0)]


def test_a_finished_run_is_replaced_with_its_checkpoints(
    interlace, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healed, checkpoints = tmp_path / "healed", tmp_path / "healed.healing"
    call = ("heal", "bundled:clip", planned, "-o", healed)
    code, told, error = interlace(*call, *HEAL, "--save-steps", 1)
    assert code == 0, error
    assert told == f"Wrote {healed} after 2 steps on 8 samples drawn from 4\n"
    names = {path.name for path in checkpoints.iterdir()}
    assert {"checkpoint-1", "checkpoint-2"} <= names

    def opened(*_: object, **__: object) -> None:
        raise _OpenedError("opened")

    def refused(*options: object) -> str:
        with monkeypatch.context() as early:
            early.setattr("interlace._cli_students.open_vlm", opened)
            code, _, error = interlace(*call, *options)
        assert code == 2
        assert names <= {path.name for path in checkpoints.iterdir()}
        return error

    shutil.move(healed, tmp_path / "elsewhere")
    assert "--resume" in refused()
    assert "--overwrite" in refused()
    assert refused("--resume") == "Error: opened\n"
    assert refused("--overwrite") == "Error: opened\n"
    (checkpoints / "notes.txt").write_text("mine")
    assert "notes.txt" in refused("--overwrite")
    with monkeypatch.context() as second:
        # which may come when the first one has made the folder
        second.setenv("RANK", "1")
        assert refused() == "Error: opened\n"
    (checkpoints / "notes.txt").unlink()
    # what is refused later leaves the checkpoints as well
    late = ("heal", "bundled:blip", planned, "-o", healed, "--overwrite", "--count", 4)
    assert interlace(*late)[0] == 2
    assert names == {path.name for path in checkpoints.iterdir()}

    shutil.move(tmp_path / "elsewhere", healed)
    (checkpoints / ".checkpoint-9.part").mkdir()
    (checkpoints / "start.safetensors").touch()
    (checkpoints / ".start.safetensors.part").touch()
    code, _, error = interlace(*call, *HEAL, "--overwrite")
    assert code == 0, error
    left = {path.name for path in checkpoints.iterdir()}
    assert "checkpoint-2" in left
    assert not left & {"checkpoint-1", ".checkpoint-9.part", ".start.safetensors.part"}


def test_a_file_or_link_in_the_place_of_checkpoints_is_not_removed(
    interlace, tmp_path: Path
) -> None:
    place, target = tmp_path / "healed.healing", tmp_path / "target"
    target.mkdir()
    call = ("heal", "bundled:clip", tmp_path / "plan.json", "-o", tmp_path / "healed")
    place.symlink_to(target)
    assert "is not a folder" in interlace(*call, "--overwrite")[2]
    assert place.is_symlink()
    place.unlink()
    place.write_text("mine")
    assert "is not a folder" in interlace(*call, "--overwrite")[2]
    assert place.read_text() == "mine"
