"""The built-in data: right answers, disjoint handwriting, the same samples everywhere."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from interlace.data.boards import (
    CELL_NAMES,
    COLOURS,
    CROWDED,
    DIGITS,
    SHAPES,
    Scene,
    _scans,
    render,
)
from interlace.data.scenes import CHAT_QUESTIONS, make_scenes, vocabulary
from interlace.errors import DataError


def _answer(scene: Scene, question: str) -> str:
    """Answer a question by reading it, independently of the code that asked it."""
    at = {CELL_NAMES[thing.cell]: thing for thing in scene.objects}
    cells = re.findall(r"\b[a-d][1-4]\b", question)
    if question.startswith("what color"):
        return at[cells[0]].colour
    if question.startswith(("what shape", "which digit")):
        return at[cells[0]].kind
    if question.startswith("what is the sum"):
        return str(sum(int(at[cell].kind) for cell in cells))
    if "greater than" in question:
        return "yes" if int(at[cells[0]].kind) > int(at[cells[1]].kind) else "no"
    if question.startswith("are there more"):
        first, second = re.findall("|".join(COLOURS), question)
        count = [sum(thing.colour == c for thing in scene.objects) for c in (first, second)]
        return "yes" if count[0] > count[1] else "no"
    if question.startswith("is there"):
        wanted = question.removeprefix("is there a ").removesuffix("?")
        return "yes" if wanted in [f"{t.colour} {t.kind}" for t in scene.objects] else "no"
    what = re.fullmatch(r"how many (\w+)( objects)? are there\?", question)
    assert what is not None
    word = what[1]
    if word == "objects":
        return str(len(scene.objects))
    if word in COLOURS:
        return str(sum(thing.colour == word for thing in scene.objects))
    if word == "digits":
        return str(sum(thing.kind in DIGITS for thing in scene.objects))
    (shape,) = [name for name in SHAPES if word in (name + "s", name + "es")]
    return str(sum(thing.kind == shape for thing in scene.objects))


def test_every_answer_is_right() -> None:
    groups = set()
    for sample in make_scenes(1500, tasks=("vqa",), seed=5):
        question = sample.turns[0].text.removeprefix("<image>\n")
        assert sample.references == (_answer(sample.images[0].scene, question),), question
        assert sample.turns[1].text == sample.references[0]
        groups.add(sample.group)
    assert groups == {"colour", "shape", "digit", "count", "exist", "compare", "sum"}


def test_chats_ask_several_questions_about_one_scene() -> None:
    for sample in make_scenes(100, tasks=("chat",), seed=5):
        scene = sample.images[0].scene
        questions, answers = sample.turns[::2], sample.turns[1::2]
        assert len(questions) == len(answers) == CHAT_QUESTIONS
        texts = "".join(turn.text for turn in questions)
        assert texts.startswith("<image>\n")
        assert texts.count("<image>") == 1
        for question, answer in zip(questions, answers, strict=True):
            assert answer.text == _answer(scene, question.text.removeprefix("<image>\n"))


def test_captions_name_every_object_in_reading_order() -> None:
    for sample in make_scenes(50, tasks=("caption",), seed=1):
        assert len(sample.references) == len(set(sample.references)) >= 4
        assert sample.turns[1].text in sample.references
        objects = sample.images[0].scene.objects
        for caption in sample.references:
            found = re.findall(r"a (\w+ \w+) at (\w\d)", caption)
            assert found == [(f"{t.colour} {t.kind}", CELL_NAMES[t.cell]) for t in objects]


def test_same_seed_same_samples_other_seed_and_split_others() -> None:
    def digest(**options: object) -> str:
        made = make_scenes(40, **options)  # type: ignore[arg-type]
        pixels = b"".join(render(sample.images[0].scene).tobytes() for sample in made)
        texts = repr([(sample.id, sample.turns) for sample in made]).encode()
        return hashlib.sha256(pixels + texts).hexdigest()

    assert digest(seed=3) == digest(seed=3)
    assert digest(seed=3) != digest(seed=4)
    assert digest(seed=3) != digest(seed=3, split="test")
    # longer series begin like shorter ones
    assert make_scenes(5, seed=3) == make_scenes(9, seed=3)[:5]


def test_test_handwriting_is_never_in_the_training_split() -> None:
    train = {scan.tobytes() for scan in _scans("train")[0]}
    test = {scan.tobytes() for scan in _scans("test")[0]}
    assert len(test) == 360
    assert len(train) > 1400
    assert not train & test


def test_images_show_what_the_scene_says() -> None:
    for sample in make_scenes(20, tasks=("caption",), seed=2, split="test"):
        scene = sample.images[0].scene
        image = np.asarray(sample.images[0].open())
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        filled = {thing.cell: thing for thing in scene.objects}
        for cell in range(16):
            row, column = cell // 4 * 16, cell % 4 * 16
            inner = image[row + 3 : row + 13, column + 3 : column + 13].astype(int)
            ink = abs(inner - scene.background).sum(axis=2)
            assert (ink.max() > 60) == (cell in filled)
            if cell in filled:
                brightest = inner.reshape(-1, 3)[ink.argmax()]
                nearest = min(COLOURS, key=lambda c: abs(brightest - COLOURS[c]).sum())
                assert nearest == filled[cell].colour


def test_vocabulary_covers_every_text() -> None:
    known = set(vocabulary())
    for sample in make_scenes(600, tasks=("vqa", "caption", "chat"), seed=8):
        for text in (*[turn.text for turn in sample.turns], *sample.references):
            words = re.findall(r"\w+|[^\w\s]", text.replace("<image>", "").lower())
            assert known.issuperset(words)


def test_scenes_hold_as_many_objects_as_asked() -> None:
    made = make_scenes(200, tasks=("caption", "vqa"), seed=4, num_objects=CROWDED)
    numbers = [len(sample.images[0].scene.objects) for sample in made]
    assert set(numbers) == set(range(CROWDED[0], CROWDED[1] + 1))
    full = make_scenes(1, num_objects=(16, 16))[0].images[0].scene
    assert {thing.cell for thing in full.objects} == set(range(16))
    (alone,) = make_scenes(1, tasks=("caption",), num_objects=(1, 1))
    (thing,) = alone.images[0].scene.objects
    assert alone.references[0] == f"a {thing.name} at {CELL_NAMES[thing.cell]}"
    # what is drawn differently is told apart by its name
    usual = make_scenes(200, tasks=("caption", "vqa"), seed=4)
    assert not {sample.id for sample in made} & {sample.id for sample in usual}
    for sample in made[1::2]:
        question = sample.turns[0].text.removeprefix("<image>\n")
        assert sample.references == (_answer(sample.images[0].scene, question),), question


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 0}, "at least 1"),
        ({"count": 1, "split": "dev"}, "train"),
        ({"count": 1, "tasks": ("vqaa",)}, "Did you mean 'vqa'"),
        ({"count": 1, "tasks": ()}, "at least one"),
        ({"count": 1, "num_objects": (5, 4)}, r"\(5, 4\); give the least and the most"),
        ({"count": 1, "num_objects": (9, 17)}, "each 1..16"),
        ({"count": 1, "num_objects": (0, 4)}, "each 1..16"),
    ],
)
def test_bad_requests_are_refused_in_words(options: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        make_scenes(**options)  # type: ignore[arg-type]
