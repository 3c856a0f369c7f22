"""What a sample shows, asks and answers, for models that take one image and one question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace.data.samples import IMAGE_PLACEHOLDER, Sample
from interlace.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from interlace.data.samples import Turn


def is_caption(sample: Sample) -> bool:
    """Tell whether a sample describes its image."""
    return sample.task in ("caption", "retrieval")


def question(sample: Sample) -> str:
    """The first question, without places of images."""
    text = next((turn.text for turn in sample.turns if turn.role == "user"), None)
    if text is None:
        raise DataError(f"Sample {sample.id!r} has no user turn; add a question.")
    return text.replace(IMAGE_PLACEHOLDER, "").strip()


def answer(sample: Sample) -> str:
    """The first answer."""
    text = next((turn.text for turn in sample.turns if turn.role == "assistant"), None)
    if text is None:
        raise DataError(f"Sample {sample.id!r} has no assistant turn; add an answer.")
    return text


def check_placeholders(
    turns: Sequence[Turn], num_images: int, where: str, *, optional: bool = False
) -> None:
    """Refuse turns that do not name every image once; `optional` lets them name none at all."""
    held = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    stray = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns) - held
    if stray or (held != num_images and (held or not optional)):
        extra = f" and {stray} outside user turns" if stray else ""
        raise DataError(
            f"{where}: {held} {IMAGE_PLACEHOLDER} placeholders in user turns{extra}, but "
            f"{num_images} images. Write one {IMAGE_PLACEHOLDER} per image, in user turns only."
        )


def single_images(samples: Sequence[Sample]) -> list[Image.Image]:
    """Open the one image of every sample; DataError for one that has another number of them."""
    for sample in samples:
        if len(sample.images) != 1:
            raise DataError(
                f"Sample {sample.id!r} has {len(sample.images)} images; "
                "this model takes exactly one."
            )
    return [sample.images[0].open() for sample in samples]


def blip2_prompt(sample: Sample) -> str:
    """What BLIP-2 is asked with; nothing for a caption."""
    return "" if is_caption(sample) else f"Question: {question(sample)} Answer:"
