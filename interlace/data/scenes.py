"""The built-in data set: rendered scenes of coloured shapes and real handwritten digits.

A scene is a 4 x 4 board of 16-pixel cells, some of which hold one object: a coloured shape, or a
coloured digit drawn from a real handwritten scan (the UCI digits that scikit-learn ships). Cells
are named by column letter and row number, so `a1` is the top left and `d4` the bottom right. From
one scene come questions with one right answer, several reference captions, and the image-text
pairs of a retrieval pool.

Scenes are unlimited, deterministic in (split, seed, index), and drawn only when an image is opened.
Train and test scans are disjoint sets of handwriting, so a test digit was never seen in training.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from interlace.errors import DataError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image

    from interlace.data.samples import Sample

__all__ = [
    "CAPTION_PROMPT",
    "QUESTION_KINDS",
    "Scene",
    "SceneImage",
    "make_scene",
    "make_scenes",
    "render",
    "vocabulary",
]

Split = Literal["train", "test"]

GRID = 4
CELL = 16
IMAGE_SIZE = GRID * CELL
CELL_NAMES = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcd")
COLOURS = {
    "red": (230, 50, 45),
    "green": (55, 190, 75),
    "blue": (60, 110, 240),
    "yellow": (240, 215, 50),
    "purple": (175, 75, 215),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
DIGITS = tuple(str(digit) for digit in range(10))
NUM_OBJECTS = (3, 6)
DIGIT_FRACTION = 0.45
CAPTION_PROMPT = "Describe the image."
QUESTION_WORDS = (
    "what color is object which shape digit how many are there objects digits more than greater "
    "sum of"
)
TASKS = ("vqa", "caption", "retrieval", "chat")
CHAT_QUESTIONS = 4
CAPTION_OPENINGS = ("", "there is ", "the image shows ", "we see ")


@dataclass(frozen=True)
class Object:
    """One thing on the board.

    Attributes:
        cell: 0..15, row by row.
        colour: name of the colour.
        kind: name of the shape, or the digit.
        scan: number of the digit's handwritten scan; test scans count -1, -2 and so on.
        shift: pixels down and right from the middle of the cell, each -1..1.
    """

    cell: int
    colour: str
    kind: str
    scan: int
    shift: tuple[int, int]

    @property
    def is_digit(self) -> bool:
        """Whether the object is a handwritten digit."""
        return self.kind in DIGITS

    @property
    def name(self) -> str:
        """Colour and kind in words, such as `red circle` or `blue 7`."""
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A board: its objects in reading order and the grey level (0..255) of the background."""

    objects: tuple[Object, ...]
    background: int

    def captions(self) -> tuple[str, ...]:
        """Reference captions: the same objects in reading order behind different openings."""
        parts = [f"a {thing.name} at {CELL_NAMES[thing.cell]}" for thing in self.objects]
        text = ", ".join(parts[:-1]) + f" and {parts[-1]}"
        return tuple(opening + text for opening in CAPTION_OPENINGS)


@dataclass(frozen=True)
class SceneImage:
    """A lazily rendered image of a scene."""

    scene: Scene

    def open(self) -> Image.Image:
        """Render the scene as a 64 x 64 RGB image."""
        from PIL import Image

        return Image.fromarray(render(self.scene))

    @property
    def identity(self) -> str:
        """A stable text that tells this image from every other one."""
        return repr(self.scene)


@functools.cache
def _scans(split: Split) -> tuple[np.ndarray, dict[str, tuple[int, ...]]]:
    """Scans of one split as [n, 14, 14] intensities in 0..1, and their numbers by digit."""
    from sklearn.datasets import load_digits

    data = load_digits()
    # every fifth scan is for testing only
    chosen = (np.arange(len(data.target)) % 5 == 0) == (split == "test")
    small = data.images[chosen].astype(np.float32) / 16.0
    # 8 x 8 to 14 x 14 by linear interpolation along each axis
    position = np.linspace(0, 7, 14)
    low = np.minimum(position.astype(int), 6)
    weight = (position - low).astype(np.float32)
    rows = small[:, low] * (1 - weight)[:, None] + small[:, low + 1] * weight[:, None]
    large = rows[:, :, low] * (1 - weight) + rows[:, :, low + 1] * weight
    labels = data.target[chosen]
    by_digit = {digit: tuple(np.flatnonzero(labels == int(digit)).tolist()) for digit in DIGITS}
    return large, by_digit


@functools.cache
def _shape_mask(shape: str) -> np.ndarray:
    """Coverage of one shape on a 14 x 14 cell, in 0..1, smoothed by 4 x 4 supersampling."""
    axis = (np.arange(14 * 4) + 0.5) / 4 - 7.0
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius = np.hypot(x, y)
    inside = {
        "circle": radius < 5.6,
        "square": np.maximum(abs(x), abs(y)) < 5.0,
        "triangle": (y < 5.0) & (2 * abs(x) < y + 6.5),
        "diamond": abs(x) + abs(y) < 6.4,
        "cross": ((abs(x) < 1.9) | (abs(y) < 1.9)) & (np.maximum(abs(x), abs(y)) < 6.0),
        "ring": (radius < 6.2) & (radius > 3.4),
    }[shape]
    covered: np.ndarray = inside.astype(np.float32).reshape(14, 4, 14, 4).mean(axis=(1, 3))
    return covered


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: [64, 64, 3] uint8."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), scene.background, dtype=np.float32)
    for thing in scene.objects:
        if thing.is_digit:
            test = thing.scan < 0
            scans, _ = _scans("test" if test else "train")
            mask = scans[-thing.scan - 1 if test else thing.scan]
        else:
            mask = _shape_mask(thing.kind)
        top = thing.cell // GRID * CELL + 1 + thing.shift[0]
        left = thing.cell % GRID * CELL + 1 + thing.shift[1]
        patch = image[top : top + 14, left : left + 14]
        patch += mask[..., None] * (np.asarray(COLOURS[thing.colour], np.float32) - patch)
    return (image + 0.5).astype(np.uint8)


def make_scene(rng: random.Random, split: Split) -> Scene:
    """Draw a scene at random."""
    _, by_digit = _scans(split)
    cells = sorted(rng.sample(range(GRID * GRID), rng.randint(*NUM_OBJECTS)))
    objects = []
    for cell in cells:
        scan = 0
        if rng.random() < DIGIT_FRACTION:
            kind = rng.choice(DIGITS)
            scan = rng.choice(by_digit[kind])
            scan = -scan - 1 if split == "test" else scan
        else:
            kind = rng.choice(SHAPES)
        shift = (rng.randint(-1, 1), rng.randint(-1, 1))
        objects.append(Object(cell, rng.choice(tuple(COLOURS)), kind, scan, shift))
    return Scene(tuple(objects), background=rng.randint(10, 50))


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _ask_colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = rng.choice(scene.objects)
    return f"what color is the object at {CELL_NAMES[thing.cell]}?", thing.colour


def _ask_shape(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shapes = [thing for thing in scene.objects if not thing.is_digit]
    if not shapes:
        return None
    thing = rng.choice(shapes)
    return f"what shape is at {CELL_NAMES[thing.cell]}?", thing.kind


def _ask_digit(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    digits = [thing for thing in scene.objects if thing.is_digit]
    if not digits:
        return None
    thing = rng.choice(digits)
    return f"which digit is at {CELL_NAMES[thing.cell]}?", thing.kind


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    what = rng.choice((*COLOURS, *SHAPES, "digit", "object"))
    if what in COLOURS:
        return (
            f"how many {what} objects are there?",
            str(sum(thing.colour == what for thing in scene.objects)),
        )
    if what == "object":
        return "how many objects are there?", str(len(scene.objects))
    number = sum(
        thing.is_digit if what == "digit" else thing.kind == what for thing in scene.objects
    )
    plural = what + ("es" if what.endswith("s") else "s")
    return f"how many {plural} are there?", str(number)


def _ask_exist(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    names = {thing.name for thing in scene.objects}
    if rng.random() < 0.5:
        return f"is there a {rng.choice(sorted(names))}?", "yes"
    # half of the absent things share the colour or the kind of something present
    thing = rng.choice(scene.objects)
    kinds = DIGITS if thing.is_digit else SHAPES
    if rng.random() < 0.5:
        absent = f"{thing.colour} {rng.choice(kinds)}"
    else:
        absent = f"{rng.choice(tuple(COLOURS))} {thing.kind}"
    return f"is there a {absent}?", _yes_no(absent in names)


def _ask_compare(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    digits = [thing for thing in scene.objects if thing.is_digit]
    if len(digits) >= 2 and rng.random() < 0.6:
        one, two = rng.sample(digits, 2)
        first, second = CELL_NAMES[one.cell], CELL_NAMES[two.cell]
        question = f"is the digit at {first} greater than the digit at {second}?"
        return question, _yes_no(int(one.kind) > int(two.kind))
    present = sorted({thing.colour for thing in scene.objects})
    one_colour = rng.choice(present)
    two_colour = rng.choice([colour for colour in COLOURS if colour != one_colour])
    if rng.random() < 0.5:
        one_colour, two_colour = two_colour, one_colour
    count = {colour: sum(t.colour == colour for t in scene.objects) for colour in COLOURS}
    return (
        f"are there more {one_colour} objects than {two_colour} objects?",
        _yes_no(count[one_colour] > count[two_colour]),
    )


def _ask_sum(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    digits = [thing for thing in scene.objects if thing.is_digit]
    if len(digits) < 2:
        return None
    one, two = rng.sample(digits, 2)
    return (
        f"what is the sum of the digits at {CELL_NAMES[one.cell]} and {CELL_NAMES[two.cell]}?",
        str(int(one.kind) + int(two.kind)),
    )


_ASK: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "digit": _ask_digit,
    "count": _ask_count,
    "exist": _ask_exist,
    "compare": _ask_compare,
    "sum": _ask_sum,
}
QUESTION_KINDS = tuple(_ASK)


def ask(
    scene: Scene, rng: random.Random, kinds: Sequence[str] = QUESTION_KINDS
) -> tuple[str, str, str]:
    """One question about a scene.

    Args:
        scene: what is asked about.
        rng: source of every choice.
        kinds: the kinds of question to draw from, each as likely as the others where the scene
            has such a question (a scene without digits has no sum).

    Returns:
        (kind, question, answer).

    Raises:
        DataError: the scene has no question of these kinds.
    """
    for kind in rng.sample(kinds, len(kinds)):
        pair = _ASK[kind](scene, rng)
        if pair:
            return kind, *pair
    raise DataError(f"This scene has no question of the kinds {tuple(kinds)}; allow more kinds.")


def _rng(split: str, seed: int, index: int) -> random.Random:
    key = hashlib.sha256(f"scenes/{split}/{seed}/{index}".encode()).digest()
    return random.Random(int.from_bytes(key[:8], "big"))


def _sample(task: str, scene: Scene, rng: random.Random, identity: str) -> Sample:
    from interlace.data.samples import Sample, Turn

    image = SceneImage(scene)
    if task == "chat":
        turns: list[Turn] = []
        for _ in range(CHAT_QUESTIONS):
            _, text, answer = ask(scene, rng)
            mark = "" if turns else "<image>\n"
            turns += [Turn("user", f"{mark}{text}"), Turn("assistant", answer)]
        return Sample(identity, task, (image,), tuple(turns))
    if task == "vqa":
        kind, text, answer = ask(scene, rng)
        pair = (Turn("user", f"<image>\n{text}"), Turn("assistant", answer))
        return Sample(identity, task, (image,), pair, (answer,), kind)
    captions = scene.captions()
    pair = (Turn("user", f"<image>\n{CAPTION_PROMPT}"), Turn("assistant", rng.choice(captions)))
    return Sample(identity, task, (image,), pair, captions, "caption")


def make_scenes(
    count: int,
    *,
    tasks: Sequence[str] = ("vqa", "caption"),
    seed: int = 0,
    split: Split = "train",
) -> list[Sample]:
    """Make samples of the built-in data set.

    Args:
        count: number of samples, at least 1. Sample i belongs to `tasks[i % len(tasks)]`.
        tasks: any of "vqa", "caption", "retrieval", and "chat", four questions about one scene in
            one conversation, to train on.
        seed: which endless series of scenes; the same seed gives the same samples everywhere.
        split: "train" or "test". They share neither scenes nor handwriting.

    Returns:
        Samples with lazily rendered 64 x 64 images.

    Raises:
        DataError: `count` below 1, an unknown task or an unknown split.
    """
    if count < 1:
        raise DataError(f"count is {count}; the scenes data set needs at least 1 sample.")
    if split not in ("train", "test"):
        raise DataError(unknown_name("split of scenes", split, ("train", "test")))
    if not tasks:
        raise DataError(f"tasks is empty; name at least one of {', '.join(TASKS)}.")
    for task in tasks:
        if task not in TASKS:
            raise DataError(unknown_name("scenes task", task, TASKS))
    made = []
    for index in range(count):
        rng = _rng(split, seed, index)
        scene = make_scene(rng, split)
        identity = f"scenes-{split}-{seed}-{index}"
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
