"""Boards of coloured shapes and real handwritten digits: what a scene holds, and its picture.

A scene is a 4 x 4 board of 16-pixel cells, some of which hold one object: a coloured shape, or a
coloured digit drawn from a real handwritten scan (the UCI digits that scikit-learn ships). Cells
are named by column letter and row number, so `a1` is the top left and `d4` the bottom right.

Train and test scans are disjoint sets of handwriting, so a test digit was never seen in training.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import random

    from PIL import Image

__all__ = ["Object", "Scene", "SceneImage", "make_scene", "render"]

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
# harder: longer captions, more to count, to find and to tell apart
CROWDED = (7, 9)
DIGIT_FRACTION = 0.45
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
        text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
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


def make_scene(
    rng: random.Random, split: Split, num_objects: tuple[int, int] = NUM_OBJECTS
) -> Scene:
    """Draw a scene at random; `num_objects` are the least and the most that it holds, 1..16."""
    _, by_digit = _scans(split)
    cells = sorted(rng.sample(range(GRID * GRID), rng.randint(*num_objects)))
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
