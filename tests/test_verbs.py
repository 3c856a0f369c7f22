"""The verbs say in words what they were given instead of what they take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tiny import TINY

import interlace as il
from interlace.errors import ConfigError, DataError
from interlace.records import Plan, TowerPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from interlace.models import VLM

PLAN = Plan({"text": TowerPlan(4, drop=(1,), tune=(2,))})


@pytest.fixture(scope="module")
def dense() -> VLM:
    return il.open_model(TINY["clip"](text=4, vision=4))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, out: il.score(model, []),
        lambda model, out: il.prune(model, PLAN),
        lambda model, out: il.heal(model, data=[]),
        lambda model, out: il.evaluate(model),
        lambda model, out: il.export(model, out),
    ],
    ids=["score", "prune", "heal", "evaluate", "export"],
)
def test_a_bare_model_is_told_to_be_opened(
    dense: VLM, tmp_path: Path, call: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=r"is a CLIPModel.*open_model\(model\)"):
        call(dense.model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bare_teacher_is_told_to_be_opened(dense: VLM) -> None:
    with pytest.raises(ConfigError, match="The teacher is a CLIPModel"):
        il.heal(il.prune(dense, PLAN), teacher=dense.model, data=[])


@pytest.mark.parametrize("data", ["scenes", 5, None])
def test_data_that_is_none_is_told(dense: VLM, data: Any) -> None:
    with pytest.raises(DataError, match=f"data is a {type(data).__name__}"):
        il.score(dense, data)
    with pytest.raises(DataError, match=f"data is a {type(data).__name__}"):
        il.heal(il.prune(dense, PLAN), data=data)


def test_a_recipe_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe is a dict.*Recipe\.from_dict"):
        il.run({"model": {"path": "bundled:clip"}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", [None, 5, ""])
def test_an_output_that_is_no_path_is_told(dense: VLM, output: Any) -> None:
    student = il.prune(dense, PLAN)
    with pytest.raises(ConfigError, match=f"output is {output!r}; give the path of a folder"):
        il.export(student, output)
    if output is not None:
        data = il.samples("scenes", count=2, tasks=("retrieval",))
        with pytest.raises(ConfigError, match="give the path of a folder"):
            il.heal(student, data=data, output=output)


def test_records_that_are_none_are_told(dense: VLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"records takes Scores, .* got int"):
        il.export(il.prune(dense, PLAN), tmp_path / "out", records=5)  # type: ignore[arg-type]
    scores = il.Scores.from_similarity("text", {1: [0.5]}, 2)
    for wrong in ("scores.json", [scores]):
        with pytest.raises(ConfigError, match=f"was given a {type(wrong).__name__}; give every"):
            il.Scores.merge(scores, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="with_gates was given a Scores; give the HealReport"):
        scores.with_gates(scores)  # type: ignore[arg-type]


def test_tasks_of_samples_are_a_sequence() -> None:
    for tasks in (5, "vqa", ()):
        with pytest.raises(ConfigError, match=r"tasks is .*; give a sequence of chat"):
            il.samples("scenes", count=1, tasks=tasks)  # type: ignore[arg-type]


def test_counts_of_samples_are_whole_numbers() -> None:
    for count in ("8", 2.5):
        with pytest.raises(ConfigError, match="count is"):
            il.samples("scenes", count=count)


def test_a_single_record_is_taken(dense: VLM, tmp_path: Path) -> None:
    student = il.prune(dense, PLAN)
    folder = il.export(student, tmp_path / "out", records=PLAN, verify=False)
    assert Plan.load(folder / "plan.json") == PLAN
