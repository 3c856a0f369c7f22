"""Captioning: greedy captions scored with CIDEr, BLEU-1..4 and exact match.

The scorers are those of `pycocoevalcap`. Its Java tokenizer is not used: captions are tokenised
here, in the same spirit (lower case, Penn-Treebank clitics, punctuation removed).

Source: CIDEr (arXiv 1411.5726), BLEU (ACL P02-1040), as in the COCO caption evaluation.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from interlace.errors import ConfigError, DataError
from interlace.evaluate._common import TaskResult
from interlace.evaluate.generate import generate_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.data.samples import Sample
    from interlace.evaluate._common import Options
    from interlace.models.handle import VLM

__all__ = ["caption_scores", "check_scorers", "measure", "tokenise_caption"]

NUM_EXAMPLES = 8

_CLITICS = re.compile(r"(?<=\w)(n't|'s|'re|'ve|'ll|'d|'m)\b")
_TYPOGRAPHIC = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"'})
# words keep inner hyphens, apostrophes, stops and commas between digits ("red-haired", "o'clock",
# "3.5", "1,000", "u.s"); signs that carry meaning stand alone; all other punctuation is dropped
_TOKENS = re.compile(
    r"(?:n't|'(?:s|re|ve|ll|d|m|\d\w*))(?!\w)|\w+(?:[-'/]\w+|[.,:](?=\d)\d+|\.(?=\w)\w+)*|[%$#&@+*=<>]"
)


def tokenise_caption(text: str) -> str:
    """Turn a caption into space-separated tokens for the scorers.

    Lower case; clitics stand alone ("isn't" -> "is n't", "man's" -> "man 's"); punctuation is
    removed; hyphenated words and numbers stay whole. On plain sentences this equals the COCO
    evaluation's tokenizer; it differs on brackets (removed here, "-lrb-" there) and on
    abbreviations (the final stop is removed here).

    Source: pycocoevalcap's PTBTokenizer and its list of punctuation.
    """
    text = text.translate(_TYPOGRAPHIC).lower().replace("cannot", "can not")
    return " ".join(_TOKENS.findall(_CLITICS.sub(r" \1", text)))


def check_scorers() -> tuple[Any, Any]:
    """Import the scorers.

    Returns:
        The classes Cider and Bleu.

    Raises:
        ConfigError: the package that holds them is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ConfigError(
            f"The task caption needs the package pycocoevalcap ({error}). "
            'Install it with: pip install "interlace-vlm[eval]", or leave the task out.'
        ) from error
    return Cider, Bleu


def accepted_captions(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """Tokenise the reference captions of every image.

    Raises:
        DataError: fewer than 2 images, or an image without a caption that holds a word. CIDEr
            weighs n-grams by how rare they are among the references of the evaluated images: for
            one image every weight would be zero.
    """
    if len(references) < 2:
        raise DataError(
            f"Captioning was given {len(references)} image(s), but CIDEr takes its n-gram weights "
            "from the references of the evaluated images and means nothing below 2. Give more."
        )
    accepted = [[tokenise_caption(text) for text in texts] for texts in references]
    accepted = [[text for text in texts if text] for texts in accepted]
    bare = [index for index, texts in enumerate(accepted) if not texts]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(references)} images have no reference caption with a word in it, "
            f"the first is number {bare[0]}. Give Sample.references at least one caption."
        )
    return accepted


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Score captions against their references.

    Args:
        predictions: one caption per image.
        references: the reference captions of each image, at least one each.

    Returns:
        "cider" (0..10; often printed times 100), "bleu_1".."bleu_4" (0..1, over the corpus) and
        "exact_match" (fraction of captions whose tokens equal those of any reference).

    Raises:
        ConfigError: the scorers are not installed.
        DataError: lengths that differ, or what `accepted_captions` refuses.
    """
    cider, bleu = check_scorers()
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} captions but {len(references)} sets of references; "
            "give one set per caption."
        )
    accepted = accepted_captions(references)
    tokens = [tokenise_caption(text) for text in predictions]
    truth = dict(enumerate(accepted))
    given = {index: [text] for index, text in enumerate(tokens)}
    bleu_scores, _ = bleu(4).compute_score(truth, given, verbose=0)
    cider_score, _ = cider().compute_score(truth, given)
    scores = {"cider": float(cider_score)}
    scores |= {f"bleu_{order}": float(value) for order, value in enumerate(bleu_scores, start=1)}
    matches = sum(text in texts for text, texts in zip(tokens, accepted, strict=True))
    return scores | {"exact_match": matches / len(tokens)}


def measure(vlm: VLM, samples: Sequence[Sample], options: Options) -> TaskResult:
    """Caption every image greedily and score the captions; see `caption_scores`."""
    references = [sample.references for sample in samples]
    predictions = generate_texts(vlm, samples, options, description="captioning")
    metrics = caption_scores(predictions, references)
    examples = [
        {"id": sample.id, "reference": sample.references[0], "caption": text}
        for sample, text in zip(samples[:NUM_EXAMPLES], predictions, strict=False)
    ]
    return TaskResult(metrics, {"examples": examples, "tokenizer": "built in (PTB style, no Java)"})
