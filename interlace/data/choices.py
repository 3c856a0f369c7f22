"""Questions with choices: the choices go into the question with letters, the answer is a letter."""

from __future__ import annotations

from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from interlace.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CHOICE_KEYS = ("choices", "options")
HINT_KEYS = ("hint", "context")
RIGHT_KEYS = ("correct_choice_idx", "answer", "label")
PROMPT = "Answer with the letter of the right choice."


def has_choices(record: Mapping[str, Any]) -> bool:
    """Tell whether a record gives choices to its question; an empty list is none."""
    return any(record.get(key) not in (None, [], ()) for key in CHOICE_KEYS)


def with_choices(
    question: str, record: Mapping[str, Any], where: str
) -> tuple[str, tuple[str, ...]]:
    """Put choices, and a hint where there is one, into a question.

    Args:
        question: as the record asks it.
        record: has no empty values. The right choice stands in it as its index from 0, its letter,
            or its text.
        where: file and record, for errors.

    Returns:
        The question, and the letter of the right choice; none where the record does not say.

    Raises:
        DataError: choices that are no list, or an answer that is none of them.
    """
    choices = _first(record, CHOICE_KEYS)
    most = len(ascii_uppercase)
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= most:
        raise DataError(
            f"{where}: the choices of the question are {str(choices)[:80]!r}; expected a list of 2 "
            f"to {most} texts."
        )
    texts = [str(each).strip() for each in choices]
    lines = [str(_first(record, HINT_KEYS) or "").strip(), question]
    lines += [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False)]
    asked = "\n".join(line for line in (*lines, PROMPT) if line)
    right = _first(record, RIGHT_KEYS)
    return asked, () if right is None else (ascii_uppercase[_place(right, texts, where)],)


def _place(right: Any, texts: Sequence[str], where: str) -> int:
    said = str(right).strip()
    named = isinstance(right, str)
    letters = ascii_uppercase[: len(texts)]
    if named and said in texts:
        return texts.index(said)
    if named and len(said) == 1 and said.upper() in letters:
        return letters.index(said.upper())
    if said.isdecimal() and int(said) < len(texts):
        return int(said)
    raise DataError(
        f"{where}: the answer {right!r} names none of the {len(texts)} choices. Give its index "
        "from 0, its letter, or its text."
    )


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((record[key] for key in keys if key in record), None)
