from __future__ import annotations

import pytest

from interlace.data.samples import Sample, Turn
from interlace.errors import DataError
from interlace.evaluate.vqa import accuracy_of, answer_accuracy, normalise_answer


def question(references: tuple[str, ...], group: str = "", name: str = "q") -> Sample:
    turns = (Turn("system", "be brief"), Turn("user", "<image>\nwhat?"), Turn("assistant", "x"))
    return Sample(name, "vqa", (), turns, references, group)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Red", "red"),
        ("  a red\tcar\n", "red car"),
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("3.5", "3.5"),
        ("1,000 dogs", "1000 dogs"),
        ("1,000-meter", "1000meter"),
        ("t-shirt", "t shirt"),
        ("yes!", "yes"),
        ("left, right", "left right"),
        ("red/blue", "red blue"),
        ("Dont know", "don't know"),
        ("don't know", "don't know"),
        ("its", "its"),
        ("U.S.", "us"),
        ("an", "an"),
        ("A.", "a"),
        ("", ""),
    ],
)
def test_normalisation(given: str, expected: str) -> None:
    assert normalise_answer(given) == expected


def test_accuracy_of_one_answer() -> None:
    assert answer_accuracy("", ("A",)) == answer_accuracy("the", ("A",)) == 0.0
    assert answer_accuracy("A red car.", ("blue", "Red Car")) == 1.0
    assert answer_accuracy("red", ("blue",) * 9) == 0.0
    # 10 humans: a third for each that agrees, at most 1
    for agree, expected in ((0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (7, 1.0)):
        humans = ("two",) * agree + ("blue",) * (10 - agree)
        assert answer_accuracy("2", humans) == pytest.approx(expected)


def test_accuracy_over_all_and_per_group() -> None:
    samples = [
        question(("red",), "colour"),
        question(("blue",), "colour"),
        question(("2",), "count"),
        question(("x",)),
    ]
    result = accuracy_of(["red", "red", "two", "y"], samples)
    assert result.metrics == {"accuracy": 0.5, "accuracy/colour": 0.5, "accuracy/count": 1.0}
    assert result.details["group_sizes"] == {"colour": 2, "count": 1}
    example = result.details["examples"][1]
    assert (example["question"], example["answer"]) == ("what?", "red")


def test_samples_without_references_are_named() -> None:
    with pytest.raises(DataError, match=r"1 of 2 samples .* first is 'bare'"):
        accuracy_of(["a", "b"], [question(("a",)), question((), name="bare")])
