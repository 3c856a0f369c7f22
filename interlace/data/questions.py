"""Questions about a scene that have one right answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace.data.boards import CELL_NAMES, COLOURS, DIGITS, SHAPES
from interlace.errors import DataError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from interlace.data.boards import Scene

__all__ = ["QUESTION_KINDS", "QUESTION_WORDS", "ask"]

QUESTION_WORDS = (
    "what color is object which shape digit how many are there objects digits more than greater "
    "sum of"
)


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
