"""The built-in data set: questions, captions and image-text pairs about rendered scenes.

From one scene (`boards.py`) come questions with one right answer (`questions.py`), several
reference captions, and the image-text pairs of a retrieval pool. Scenes are unlimited,
deterministic in (split, seed, index), and drawn only when an image is opened.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

from interlace.data.boards import (
    CAPTION_OPENINGS,
    CELL_NAMES,
    COLOURS,
    GRID,
    NUM_OBJECTS,
    SHAPES,
    SceneImage,
    make_scene,
)
from interlace.data.questions import QUESTION_WORDS, ask
from interlace.data.samples import IMAGE_PLACEHOLDER, TASKS, Sample, Turn, scenes_split
from interlace.errors import DataError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.data.boards import Scene, Split

__all__ = ["CAPTION_PROMPT", "make_scenes", "vocabulary"]

CAPTION_PROMPT = "Describe the image."
CHAT_QUESTIONS = 4


def _rng(split: str, seed: int, index: int) -> random.Random:
    key = hashlib.sha256(f"scenes/{split}/{seed}/{index}".encode()).digest()
    return random.Random(int.from_bytes(key[:8], "big"))


def _sample(task: str, scene: Scene, rng: random.Random, identity: str) -> Sample:
    image = SceneImage(scene)
    if task == "chat":
        turns: list[Turn] = []
        for _ in range(CHAT_QUESTIONS):
            _, text, answer = ask(scene, rng)
            mark = "" if turns else IMAGE_PLACEHOLDER + "\n"
            turns += [Turn("user", f"{mark}{text}"), Turn("assistant", answer)]
        return Sample(identity, task, (image,), tuple(turns))
    if task == "vqa":
        kind, text, answer = ask(scene, rng)
        pair = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{text}"), Turn("assistant", answer))
        return Sample(identity, task, (image,), pair, (answer,), kind)
    captions = scene.captions()
    prompt = f"{IMAGE_PLACEHOLDER}\n{CAPTION_PROMPT}"
    pair = (Turn("user", prompt), Turn("assistant", rng.choice(captions)))
    return Sample(identity, task, (image,), pair, captions, "caption")


def make_scenes(
    count: int,
    *,
    tasks: Sequence[str] = ("vqa", "caption"),
    seed: int = 0,
    split: Split = "train",
    num_objects: tuple[int, int] = NUM_OBJECTS,
) -> list[Sample]:
    """Make samples of the built-in data set.

    Args:
        count: number of samples, at least 1. Sample i belongs to `tasks[i % len(tasks)]`.
        tasks: any of "vqa", "caption", "retrieval", and "chat", four questions about one scene in
            one conversation, to train on.
        seed: which endless series of scenes; the same seed gives the same samples everywhere.
        split: "train" or "test". They share neither scenes nor handwriting.
        num_objects: the least and the most objects of a scene, 1..16. More make it harder: captions
            grow by six words with each, and there is more to count and to tell apart. The bundled
            models know the 3 to 6 that are usual.

    Returns:
        Samples with lazily rendered 64 x 64 images.

    Raises:
        DataError: `count` below 1, an unknown task or split, or numbers of objects that are none.
    """
    if count < 1:
        raise DataError(f"count is {count}; the scenes data set needs at least 1 sample.")
    scenes_split(split)
    if not tasks:
        raise DataError(f"tasks is empty; name at least one of {', '.join(TASKS)}.")
    for task in tasks:
        if task not in TASKS:
            raise DataError(unknown_name("scenes task", task, TASKS))
    least, most = num_objects
    if not 1 <= least <= most <= GRID * GRID:
        raise DataError(
            f"num_objects is {num_objects}; give the least and the most objects of a scene, "
            f"each 1..{GRID * GRID}."
        )
    # what is usual needs no mark
    mark = "" if num_objects == NUM_OBJECTS else f"-{least}to{most}"
    made = []
    for index in range(count):
        rng = _rng(split, seed, index)
        scene = make_scene(rng, split, num_objects)
        identity = f"scenes{mark}-{split}-{seed}-{index}"
        made.append(_sample(tasks[index % len(tasks)], scene, rng, identity))
    return made


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that questions, answers and captions can hold, sorted."""
    words = {"describe", "the", "image", ".", "?", ",", "and", "a", "at", "yes", "no"}
    for opening in CAPTION_OPENINGS:
        words.update(opening.split())
    words.update(QUESTION_WORDS.split())
    words.update(CELL_NAMES, COLOURS, SHAPES, (str(number) for number in range(19)))
    words.update(shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES)
    return tuple(sorted(words))
