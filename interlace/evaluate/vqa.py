"""Visual question answering: greedy answers compared with the accepted ones.

Source: VQA (arXiv 1505.00468) and VQA v2 (arXiv 1612.00837), accuracy of section 3 and the answer
normalisation of the official evaluation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from interlace.data.sample_texts import question
from interlace.errors import DataError
from interlace.evaluate._common import TaskResult
from interlace.evaluate.generate import generate_texts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from interlace.data.samples import Sample
    from interlace.evaluate._common import Options
    from interlace.models.handle import VLM

__all__ = ["accuracy_of", "answer_accuracy", "measure", "normalise_answer"]

HUMAN_ANSWERS = 10
NUM_EXAMPLES = 8

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# forms that mean nothing else without their apostrophe; "its", "were", "well" and the like do
_FORMS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how's i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock
oughtn't shan't she's should've shouldn't somebody's someone's that'd that'll that's there'd there's
they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd
where's where've who'd who'll who's who've why'd why's won't would've wouldn't y'all you'd you'll
you're you've
"""
_CONTRACTIONS = {form.replace("'", ""): form for form in _FORMS.split()}


def normalise_answer(text: str) -> str:
    """Bring an answer into the form in which answers are compared.

    In this order: line breaks and tabs become spaces; punctuation is removed where it stands
    beside a space or where the text groups digits ("1,000"), otherwise it becomes a space; full
    stops go unless a digit follows; everything in lower case; number words up to ten (and "none")
    become digits; "a", "an", "the" go, unless nothing else is left, since "A" may be a choice;
    contractions get their apostrophe.

    Source: the official VQA evaluation; unlike there, every answer is normalised, also when all
    references agree, a lone article stays, and the list of contractions is our own.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    grouped = _GROUPED_DIGITS.search(text) is not None
    given = text
    for mark in _MARKS:
        glued = grouped or f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if glued else " ")
    text = _FULL_STOP.sub("", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    said = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_CONTRACTIONS.get(word, word) for word in said)


def answer_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Accuracy of one answer.

    Args:
        prediction: the model's answer.
        references: the accepted answers, one per human where several were asked.

    Returns:
        In 0..1. With fewer than 10 references: 1 if the answer equals any of them. With 10 or
        more: min(n / 3, 1), where n references agree with the answer.

    Source: arXiv 1505.00468, section 3, min(#humans / 3, 1). The official script averages this
    over all subsets that leave one human out, which gives 0.3, 0.6, 0.9 for n = 1, 2, 3.
    """
    given = normalise_answer(prediction)
    matches = sum(normalise_answer(reference) == given for reference in references)
    if len(references) >= HUMAN_ANSWERS:
        return min(matches / 3, 1.0)
    return float(matches > 0)


def check_references(samples: Sequence[Sample]) -> None:
    """Refuse samples without an accepted answer.

    Raises:
        DataError: a sample has no reference answer.
    """
    bare = [sample.id for sample in samples if not sample.references]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(samples)} samples have no reference answer, the first is "
            f"'{bare[0]}'. The task vqa compares with Sample.references; give at least one each."
        )


def accuracy_of(predictions: Iterable[str], samples: Sequence[Sample]) -> TaskResult:
    """Mean accuracy over all samples and over every group.

    Args:
        predictions: one answer per sample, in order.
        samples: the questions; `references` holds the accepted answers.

    Returns:
        Metrics "accuracy" and, where samples name groups, "accuracy/<group>", all in 0..1;
        details with the number of samples per group and the first examples.

    Raises:
        DataError: a sample has no reference answer.
    """
    check_references(samples)
    scored = [
        (sample, text, answer_accuracy(text, sample.references))
        for sample, text in zip(samples, predictions, strict=True)
    ]
    by_group: dict[str, list[float]] = defaultdict(list)
    for sample, _, value in scored:
        if sample.group:
            by_group[sample.group].append(value)
    metrics = {"accuracy": sum(value for _, _, value in scored) / len(scored)}
    metrics |= {
        f"accuracy/{name}": sum(by_group[name]) / len(by_group[name]) for name in sorted(by_group)
    }
    examples = [
        {
            "id": sample.id,
            "question": question(sample),
            "accepted": list(dict.fromkeys(sample.references))[:3],
            "answer": text,
            "accuracy": value,
        }
        for sample, text, value in scored[:NUM_EXAMPLES]
    ]
    sizes = {name: len(by_group[name]) for name in sorted(by_group)}
    return TaskResult(metrics, {"group_sizes": sizes, "examples": examples})


def measure(vlm: VLM, samples: Sequence[Sample], options: Options) -> TaskResult:
    """Answer every question greedily and score the answers; see `accuracy_of`."""
    return accuracy_of(generate_texts(vlm, samples, options, description="answering"), samples)
