"""Questions with choices: the choices go into the question with letters, the answer is a letter."""

from __future__ import annotations

import re
from itertools import takewhile
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from interlace.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROMPT = "Answer with the letter of the right choice."

# how tables of texts that came through pandas hold what is not there
_BLANK = ("", "nan")


def choices_in_columns(record: Mapping[str, Any]) -> list[str]:
    """Return the choices that stand in columns A, B, C and on, as in MMBench; may be empty."""
    texts = (str(record.get(letter, "")).strip() for letter in ascii_uppercase)
    return list(takewhile(lambda text: text not in _BLANK, texts))


def with_choices(
    question: str, choices: Any, *, hint: str, right: Any, where: str
) -> tuple[str, tuple[str, ...]]:
    """Put choices, and a hint where there is one, into a question.

    Args:
        question: without them.
        choices: as the record holds them, a list of texts; letters that they carry already, such as
            "A. red" or "(a) red", are not put in front again.
        hint: stands in front of the question; may be empty.
        right: the right choice as its index from 0, its letter, or its text; None where the record
            does not say.
        where: file and record, for errors.

    Returns:
        The question, and the letter of the right choice, if known.

    Raises:
        DataError: choices that are no list, or an answer that is none of them.
    """
    most = len(ascii_uppercase)
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= most:
        raise DataError(
            f"{where}: the choices of the question are {str(choices)[:80]!r}; expected a list of 2 "
            f"to {most} texts."
        )
    texts = [str(each).strip() for each in choices]
    bare = _without_letters(texts)
    lettered = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, bare, strict=False)]
    lead = () if hint in _BLANK else (hint,)
    asked = "\n".join((*lead, question, *lettered, PROMPT))
    return asked, () if right is None else (ascii_uppercase[_place(right, texts, bare, where)],)


def _without_letters(texts: Sequence[str]) -> Sequence[str]:
    """Take off the letters where all choices carry theirs, in order."""
    found = [
        re.fullmatch(rf"(?is)\(?{letter}[.):]\s+(.+)", text)
        for letter, text in zip(ascii_uppercase, texts, strict=False)
    ]
    bare = [match[1] for match in found if match is not None]
    return bare if len(bare) == len(texts) else texts


def _place(right: Any, texts: Sequence[str], bare: Sequence[str], where: str) -> int:
    said = str(right).strip()
    named = isinstance(right, str)
    letters = ascii_uppercase[: len(texts)]
    for spelled in (texts, bare):
        if named and said in spelled:
            return spelled.index(said)
    if named and len(said) == 1 and said.upper() in letters:
        return letters.index(said.upper())
    if said.isdecimal() and int(said) < len(texts):
        return int(said)
    raise DataError(
        f"{where}: the answer {right!r} names none of the {len(texts)} choices. Give its index "
        "from 0, its letter, or its text."
    )
