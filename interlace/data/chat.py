"""Conversations as text: the chat template, its prompt, and which characters the assistant says.

Nothing here tokenises: a rendered conversation still holds one image token per image.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from interlace.data.sample_texts import answer, question
from interlace.data.samples import IMAGE_PLACEHOLDER
from interlace.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.data.samples import Sample, Turn


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: The whole text, one image token per image.
        spans: Character ranges [start, end) that the assistant says, end-of-turn token included.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatText:
    """Renders conversations the way a processor's model expects them.

    Three formats, in this order: the chat template of the processor, that of its tokenizer, and
    where a LLaVA has neither, `USER: question ASSISTANT: answer` with the end-of-text token.
    PaliGemma holds no conversations: its processor takes a prefix, images in front of the question,
    and the answer as a suffix (`prefixed`).
    """

    def __init__(self, processor: Any) -> None:
        """Look up the template and the image token of `processor`."""
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self.image_token = str(getattr(processor, "image_token", None) or IMAGE_PLACEHOLDER)
        self._own = bool(getattr(processor, "chat_template", None))
        self._plain = not self._own and not getattr(self._tokenizer, "chat_template", None)
        self.prefixed = "PaliGemma" in type(processor).__name__

    @property
    def has_format(self) -> bool:
        """Whether it is known how the model expects questions and answers."""
        # what LLaVA 1.5 was trained on; its first checkpoints do not state it
        known = self.prefixed or "Llava" in type(self._processor).__name__
        return known or not self._plain

    def prompt(self, sample: Sample) -> str:
        """Give everything up to the last user turn, and what makes the assistant speak."""
        if self.prefixed:
            return self._prefix(sample)
        last = max((i for i, turn in enumerate(sample.turns) if turn.role == "user"), default=-1)
        if last < 0:
            raise DataError(f"Sample {sample.id!r} has no user turn; nothing can be asked.")
        return self._render(sample, sample.turns[: last + 1], ask=True)

    def _prefix(self, sample: Sample) -> str:
        """The images and the only question: all of it is seen from everywhere in it."""
        roles = [turn.role for turn in sample.turns]
        if not sample.images or roles not in (["user"], ["user", "assistant"]):
            raise DataError(
                f"Sample {sample.id!r} has {len(sample.images)} images and turns of "
                f"{', '.join(roles)}. {type(self._processor).__name__} takes images, one question "
                "and one answer; make a sample of every question, or leave this one out."
            )
        return self.image_token * len(sample.images) + question(sample)

    def suffix(self, sample: Sample) -> str:
        """Give the answer to a prefix; the processor adds the end-of-text token.

        Raises:
            DataError: There is none, or it holds the image token.
        """
        text = answer(sample)
        if not text.strip():
            raise DataError(f"Sample {sample.id!r}: its answers hold no tokens. Remove it.")
        if self.image_token in text:
            raise DataError(self._taken_for_image(sample, "assistant"))
        return text

    def _taken_for_image(self, sample: Sample, role: str) -> str:
        return (
            f"Sample {sample.id!r}: a {role} turn holds {self.image_token!r} as text, which the "
            "model would take for an image. Remove it."
        )

    def conversation(self, sample: Sample) -> Rendered:
        """Give the whole conversation and the ranges of the assistant's turns.

        A range starts where the prompt for that turn ends and stops behind the end-of-turn token.
        Where a template closes the last turn with no special token, the end-of-text token is added,
        so that the model learns to stop.

        Raises:
            DataError: No assistant turn, or a template that renders a turn differently when others
                follow, so that no range of the text is certain.
        """
        turns = sample.turns
        text = self._render(sample, turns, ask=False)
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(sample, turns[:number], ask=True)
            upto = text
            if number + 1 < len(turns):
                upto = self._render(sample, turns[: number + 1], ask=False)
            if not (text.startswith(before) and text.startswith(upto) and len(upto) >= len(before)):
                raise DataError(
                    f"Sample {sample.id!r}: the chat template renders turn {number} differently "
                    "when more turns follow, so its answer cannot be located. Keep one answer "
                    "per sample."
                )
            # Blanks behind the end-of-turn token belong to the template, not to the answer.
            spans.append((len(before), len(before) + len(upto[len(before) :].rstrip())))
        if not spans:
            raise DataError(
                f"Sample {sample.id!r} has no assistant turn; training needs an answer. "
                "Add one, or use answers=False."
            )
        return self._closed(text, spans, answered=turns[-1].role == "assistant")

    def _closed(self, text: str, spans: list[tuple[int, int]], *, answered: bool) -> Rendered:
        stop = self._tokenizer.eos_token
        start, end = spans[-1]
        if answered and stop and not text[:end].endswith(self._special):
            text = text[:end] + stop
            spans[-1] = (start, len(text))
        return Rendered(text, tuple(spans))

    @functools.cached_property
    def _special(self) -> tuple[str, ...]:
        # the named ones, and those that have no name, as what ends a turn may be
        added = self._tokenizer.added_tokens_decoder.values()
        unnamed = [token.content for token in added if token.special]
        return tuple(token for token in (*self._tokenizer.all_special_tokens, *unnamed) if token)

    def _render(self, sample: Sample, turns: Sequence[Turn], *, ask: bool) -> str:
        if not self.has_format:
            raise DataError(
                f"{type(self._processor).__name__} has no chat template, nor has its tokenizer, so "
                "how this model expects questions and answers is not known. Set "
                "processor.chat_template, or give batches of model inputs of your own."
            )
        if self._plain:
            return self._in_words(sample, turns, ask=ask)
        messages = [{"role": turn.role, "content": self._content(sample, turn)} for turn in turns]
        renderer = self._processor if self._own else self._tokenizer
        try:
            text = renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"Sample {sample.id!r}: the chat template refuses the roles "
                f"{', '.join(turn.role for turn in turns)}: {error}"
            ) from error
        return str(text)

    def _in_words(self, sample: Sample, turns: Sequence[Turn], *, ask: bool) -> str:
        names = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}
        stop = self._tokenizer.eos_token or ""
        parts = []
        for turn in turns:
            text = "".join(
                self.image_token + "\n" if part is None else part
                for part in self._pieces(sample, turn)
            )
            end = stop if turn.role == "assistant" else " "
            parts.append(names[turn.role] + text + end)
        return "".join(parts) + ("ASSISTANT:" if ask else "")

    def _content(self, sample: Sample, turn: Turn) -> str | list[dict[str, str]]:
        pieces = self._pieces(sample, turn)
        if not self._own:
            return "".join(self.image_token if piece is None else piece for piece in pieces)
        return [
            {"type": "image"} if piece is None else {"type": "text", "text": piece}
            for piece in pieces
        ]

    def _pieces(self, sample: Sample, turn: Turn) -> list[str | None]:
        """Texts of a turn with None for every image; blanks next to an image are the template's."""
        texts = turn.text.split(IMAGE_PLACEHOLDER) if turn.role == "user" else [turn.text]
        pieces: list[str | None] = []
        for number, text in enumerate(texts):
            if number:
                pieces.append(None)
            kept = text.strip() if len(texts) > 1 else text
            if self.image_token in kept or (turn.role != "user" and IMAGE_PLACEHOLDER in kept):
                raise DataError(self._taken_for_image(sample, turn.role))
            if kept or len(texts) == 1:
                pieces.append(kept)
        return pieces


def spoken_tokens(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], special: bool
) -> tuple[list[int], list[bool]]:
    """Tokenise a text and tell which tokens hold a part of one of the character ranges.

    Args:
        tokenizer: A fast tokenizer.
        text: The text before images are expanded.
        spans: Character ranges [start, end).
        special: Whether the tokenizer adds its own special tokens; these are never spoken.

    Returns:
        The token ids, and for each whether it is spoken.

    Raises:
        DataError: A tokenizer without character offsets.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, which labels need; load the "
            "fast tokenizer of the model."
        )
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    spoken = [
        # one that begins in front of the answer, such as a blank that the prompt ends in, is of it;
        # blanks may have no width, at their end, and tokens that the tokenizer adds stand at 0
        any(start < last and first < end for start, end in spans)
        for first, last in found["offset_mapping"]
    ]
    return list(found["input_ids"]), spoken


def expanded_positions(
    ids: Sequence[int], expanded: Sequence[int], image_id: int | None
) -> list[int | None]:
    """Find the tokens of a text again after each image token became tokens of the image.

    What stands in front of the first image is found from the start, what stands behind the last
    one from the end, and texts between images in their order. Tokens that the processor joined
    with those around an image, such as line breaks, are not found.

    Args:
        ids: Tokens with one image token per image.
        expanded: The same tokens; every image is any tokens, one of them or more the image token.
        image_id: The image token.

    Returns:
        The position of each token; None for image tokens and for tokens that are not found.
    """
    positions: list[int | None] = [None] * len(ids)
    for index in range(_common(ids, expanded)):
        if ids[index] == image_id:
            break
        positions[index] = index
    for back in range(1, _common(ids[::-1], expanded[::-1]) + 1):
        if ids[-back] == image_id:
            break
        positions[-back] = len(expanded) - back
    images = [index for index, token in enumerate(ids) if token == image_id]
    place = 0
    for left, right in itertools.pairwise(images):
        while place < len(expanded) and expanded[place] != image_id:
            place += 1
        found = _between(ids[left + 1 : right], expanded, place)
        if found is not None:
            trimmed, first, length = found
            for step in range(length):
                positions[left + 1 + trimmed + step] = first + step
            place = first + length
    return positions


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))


def _between(
    text: Sequence[int], expanded: Sequence[int], place: int
) -> tuple[int, int, int] | None:
    """Find a text between images: tokens left out in front, first position, and length."""
    for front, behind in ((0, 0), (1, 0), (0, 1), (1, 1)):
        wanted = list(text[front : len(text) - behind])
        if not wanted:
            return None
        for first in range(place, len(expanded) - len(wanted) + 1):
            if list(expanded[first : first + len(wanted)]) == wanted:
                return front, first, len(wanted)
    return None
