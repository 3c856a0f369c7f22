"""One record of any known schema, turned into a sample.

Known schemas, by their keys:
- `conversations`: LLaVA, messages with `from` and `value`.
- `messages`: Qwen and others, messages with `role` and `content` (text or a list of parts).
- `texts`: FineVision, pairs of `user` and `assistant`; the images stand before the first question.
- an image with a question and its answers (VQA), with choices or without, or with captions.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from interlace.data.choices import choices_in_columns, with_choices
from interlace.data.sample_texts import check_placeholders
from interlace.data.samples import IMAGE_PLACEHOLDER, TASKS, Sample, Turn
from interlace.data.scenes import CAPTION_PROMPT
from interlace.errors import DataError

if TYPE_CHECKING:
    from interlace.data.images import ImageSource

# Called with the stored value, and the column and position it stands at (None inside a message).
ImageMaker = Callable[[Any, str | None, int], "ImageSource"]

IMAGE_KEYS = ("images", "image", "img", "image_path", "file_name", "jpg", "jpeg", "png", "webp")
QUESTION_KEYS = ("question", "query")
ANSWER_KEYS = ("multiple_choice_answer", "answer", "answers", "label")
CHOICE_KEYS = ("choices", "options")
HINT_KEYS = ("hint", "context")
RIGHT_KEYS = ("correct_choice_idx", "answer", "label")
CAPTION_KEYS = ("captions", "caption", "sentences", "references", "text", "txt")

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
_KNOWN = (
    "conversations (LLaVA), messages (Qwen), texts (FineVision), image + question + answer, "
    "or image + caption"
)


class _Talk(NamedTuple):
    """Turns, and the images that stood inside the messages."""

    turns: tuple[Turn, ...]
    inline: tuple[Any, ...] = ()


def sample_from_record(
    record: Any, *, where: str, default_id: str, make_image: ImageMaker
) -> Sample:
    """Parse one record.

    Args:
        record: The decoded record.
        where: File and record, for errors.
        default_id: Id of a record that has none.
        make_image: Turns a stored image into an image source.

    Raises:
        DataError: Unknown schema, roles out of order, or image placeholders that do not match.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a record is {type(record).__name__}; expected an object.")
    present = {key: value for key, value in record.items() if not _is_missing(value)}
    if present.get("video") or present.get("videos"):
        raise DataError(f"{where}: holds a video; only images are supported. Remove the record.")
    column, stored = _stored_images(present)
    task, turns, references, inline = _content(present, len(stored), where)
    if inline and stored:
        raise DataError(
            f"{where}: images stand both in {column!r} and inside messages; give them in one place."
        )
    images = [make_image(value, column, place) for place, value in enumerate(stored)]
    images += [make_image(value, None, place) for place, value in enumerate(inline)]
    _check_turns(turns, len(images), where)
    named = str(present.get("id", present.get("question_id", default_id)))
    sample = Sample(named, task, tuple(images), turns, references)
    given = present.get("task")
    # other words under "task" tell kinds of questions apart
    as_given = as_task(sample, (given,)) if given in TASKS else None
    group = present.get("group", given if isinstance(given, str) and as_given is None else "")
    return dataclasses.replace(as_given or sample, group=str(group))


def as_task(sample: Sample, tasks: Sequence[str] | None) -> Sample | None:
    """Give the sample in one of the wanted tasks, or None if it cannot serve any of them.

    Captions serve retrieval and the reverse; a chat of one question and one answer serves vqa;
    anything serves chat.
    """
    if tasks is None or sample.task in tasks:
        return sample
    if sample.task in ("caption", "retrieval"):
        wanted = "retrieval" if sample.task == "caption" else "caption"
        if wanted in tasks:
            return dataclasses.replace(sample, task=wanted)
    exchange = [turn for turn in sample.turns if turn.role != "system"]
    if sample.task == "chat" and "vqa" in tasks and len(exchange) == 2:
        accepted = sample.references or (exchange[1].text,)
        return dataclasses.replace(sample, task="vqa", references=accepted)
    return dataclasses.replace(sample, task="chat") if "chat" in tasks else None


def _stored_images(present: Mapping[str, Any]) -> tuple[str | None, list[Any]]:
    for key in IMAGE_KEYS:
        value = present.get(key)
        # tables with a column of images leave it empty where a record is text alone
        if value is not None and value != "" and value != []:
            return key, list(value) if isinstance(value, list | tuple) else [value]
    return None, []


def _content(
    present: Mapping[str, Any], num_images: int, where: str
) -> tuple[str, tuple[Turn, ...], tuple[str, ...], tuple[Any, ...]]:
    accepted = _texts(_first(present, ("references", "answers")))
    if "conversations" in present:
        talk = _messages(present["conversations"], "from", "value", where)
        return "chat", talk.turns, accepted, talk.inline
    if "messages" in present:
        talk = _messages(present["messages"], "role", "content", where)
        return "chat", talk.turns, accepted, talk.inline
    texts = present.get("texts")
    if isinstance(texts, list | tuple) and texts and isinstance(texts[0], Mapping):
        return "chat", _finevision(texts, num_images, where), accepted, ()
    lead = (IMAGE_PLACEHOLDER + "\n") * num_images
    question = _first(present, QUESTION_KEYS)
    if isinstance(question, str) and (num_images or _first(present, ANSWER_KEYS) is not None):
        asked = _plain(question)
        # an empty list is that of an open question
        choices = next((present[key] for key in CHOICE_KEYS if present.get(key)), None)
        choices = choices or choices_in_columns(present)
        if choices:
            hint = " ".join(_texts(_first(present, HINT_KEYS)))
            right = _first(present, RIGHT_KEYS)
            asked, answers = with_choices(asked, choices, hint=hint, right=right, where=where)
            best = answers
        else:
            answers = _texts(_first(present, ("answers", *ANSWER_KEYS)))
            best = _texts(_first(present, ANSWER_KEYS))
        turns: tuple[Turn, ...] = (Turn("user", lead + asked),)
        if best:
            turns += (Turn("assistant", Counter(best).most_common(1)[0][0]),)
        # tables of questions with images hold some without
        return "vqa" if num_images else "chat", turns, answers, ()
    captions = _texts(_first(present, CAPTION_KEYS))
    if captions and num_images:
        turns = (Turn("user", lead + CAPTION_PROMPT), Turn("assistant", captions[0]))
        return "caption", turns, captions, ()
    keys = ", ".join(sorted(map(str, present))) or "none"
    raise DataError(f"{where}: unknown schema with the keys {keys}. Expected {_KNOWN}.")


def _first(present: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((present[key] for key in keys if present.get(key) is not None), None)


def _plain(text: str) -> str:
    return text.replace(IMAGE_PLACEHOLDER, "").strip()


def _is_missing(value: Any) -> bool:
    # tables write NaN where a cell is empty
    return value is None or (isinstance(value, float) and math.isnan(value))


def _texts(value: Any) -> tuple[str, ...]:
    """Flatten how answers and captions are stored: text, number, list, or wrapped in objects."""
    if _is_missing(value):
        return ()
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in _texts(item))
    if isinstance(value, Mapping):
        return _texts(_first(value, ("answer", "text", "raw", "caption")))
    return (_plain(str(value)),)


def _finevision(texts: Sequence[Any], num_images: int, where: str) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for number, pair in enumerate(texts):
        if not isinstance(pair, Mapping) or not {"user", "assistant"} <= pair.keys():
            raise DataError(f"{where}: texts[{number}] needs the keys 'user' and 'assistant'.")
        lead = "" if number else (IMAGE_PLACEHOLDER + "\n") * num_images
        turns.append(Turn("user", lead + _plain(str(pair["user"] or ""))))
        turns.append(Turn("assistant", _plain(str(pair["assistant"] or ""))))
    return tuple(turns)


def _messages(messages: Any, role_key: str, text_key: str, where: str) -> _Talk:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: the conversation is empty or not a list; give its messages.")
    turns: list[Turn] = []
    inline: list[Any] = []
    for number, message in enumerate(messages):
        spot = f"{where}, message {number}"
        if not isinstance(message, Mapping):
            raise DataError(f"{spot}: is {type(message).__name__}; expected an object.")
        # Both spellings are met in the wild, whatever the list is called.
        role = _first(message, (role_key, "role", "from"))
        content = _first(message, (text_key, "content", "value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{spot}: role {role!r} is unknown; use one of {', '.join(_ROLES)}.")
        if isinstance(content, list | tuple):
            content = _parts(content, inline, spot)
        if not isinstance(content, str):
            raise DataError(f"{spot}: has no text under {text_key!r}; give a text.")
        turns.append(Turn(_ROLES[role], content))
    return _Talk(tuple(turns), tuple(inline))


def _parts(parts: Sequence[Any], inline: list[Any], spot: str) -> str:
    text: list[str] = []
    for part in parts:
        if isinstance(part, str):
            text.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text.append(part["text"])
        elif kind in ("image", "image_url"):
            text.append(IMAGE_PLACEHOLDER)
            value = _first(part, ("image", "path", "url", "image_url"))
            if isinstance(value, Mapping) and "url" in value:
                value = value["url"]
            if value is not None:
                inline.append(value.removeprefix("file://") if isinstance(value, str) else value)
        else:
            raise DataError(f"{spot}: a part of type {kind!r} is unknown; use 'text' or 'image'.")
    return "".join(text)


def _check_turns(turns: Sequence[Turn], num_images: int, where: str) -> None:
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles and roles[0] == "system" else roles
    expected = [("user", "assistant")[number % 2] for number in range(len(talk))]
    if not talk or talk != expected:
        raise DataError(
            f"{where}: roles out of order ({', '.join(roles)}). Expected an optional system turn, "
            "then user and assistant in turn. Merge or remove the extra messages."
        )
    check_placeholders(turns, num_images, where)
