"""What a sample shows, asks and answers, for models that take one image and one question."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from interlace.data.samples import IMAGE_PLACEHOLDER, Sample
from interlace.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


def caption(sample: Sample, seed: int) -> str:
    """One caption of a sample: of several, always the same one for this seed."""
    if sample.task == "vqa":
        return f"{question(sample)} {answer(sample)}"
    found = sample.references or tuple(
        turn.text for turn in sample.turns if turn.role == "assistant"
    )
    if not found:
        raise DataError(f"Sample {sample.id!r} has no caption; add one.")
    digest = hashlib.sha256(f"{seed}:{sample.id}".encode()).digest()
    return found[int.from_bytes(digest[:8], "big") % len(found)]


def check_single_image(sample: Sample) -> None:
    """Refuse another number of images than one, with a DataError."""
    if len(sample.images) != 1:
        raise DataError(
            f"Sample {sample.id!r} has {len(sample.images)} images, but this model takes exactly "
            "one. Give it one image, or leave the sample out."
        )


def check_num_images(samples: Iterable[Sample], objective: str) -> None:
    """Refuse samples with another number of images than a model of this objective can take.

    Raises:
        DataError: a sample has another number than the one that all models but those of chats take.
    """
    if objective != "chat":
        for sample in samples:
            check_single_image(sample)


def single_images(samples: Sequence[Sample]) -> list[Image.Image]:
    """Open the one image of every sample; DataError for one that has another number of them."""
    for sample in samples:
        check_single_image(sample)
    return [sample.images[0].open() for sample in samples]


def check_learnable(sample: Sample, objective: str) -> None:
    """Refuse a sample that no batch can train on, as far as that shows without its images.

    Raises:
        DataError: it has no answer or caption, or another number of images than the one that all
            models but those of chats take.
    """
    check_num_images((sample,), objective)
    if objective in ("chat", "vqa"):
        answer(sample)
    else:
        caption(sample, 0)


def blip2_prompt(sample: Sample) -> str:
    """What BLIP-2 is asked with; nothing for a caption."""
    return "" if is_caption(sample) else f"Question: {question(sample)} Answer:"
