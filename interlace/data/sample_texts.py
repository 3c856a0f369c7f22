"""What a sample asks and answers, for models that take a single question."""

from __future__ import annotations

from interlace.data.samples import IMAGE_PLACEHOLDER, Sample
from interlace.errors import DataError


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


def blip2_prompt(sample: Sample) -> str:
    """What BLIP-2 is asked with; nothing for a caption."""
    return "" if is_caption(sample) else f"Question: {question(sample)} Answer:"
