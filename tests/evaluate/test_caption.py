from __future__ import annotations

import math
import sys

import pytest

from interlace.errors import ConfigError, DataError
from interlace.evaluate.caption import caption_scores, check_scorers, tokenise_caption


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A red square, and 2 blue circles.", "a red square and 2 blue circles"),
        ("There's a man's hat; it isn't mine!", "there 's a man 's hat it is n't mine"),
        (
            '3.5 x 1,000 (big) "quoted" red-haired -- yes...',
            "3.5 x 1,000 big quoted red-haired yes",
        ),
        (
            "they've cannot o'clock \u201csmart\u201d it\u2019s",
            "they 've can not o'clock smart it 's",
        ),
        ("a cat/dog & 10% caf\u00e9", "a cat/dog & 10 % caf\u00e9"),
        (" ?! ", ""),
    ],
)
def test_tokens(text: str, tokens: str) -> None:
    assert tokenise_caption(text) == tokens


def test_scores_equal_the_scorers_used_directly() -> None:
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    predictions = ["A red square.", "a dog runs on green grass", "two cats"]
    references = [
        ("a red square at a1", "The red square"),
        ("a dog is running on the grass",),
        ("two cats", "Two cats."),
    ]
    found = caption_scores(predictions, references)
    given = {0: ["a red square"], 1: ["a dog runs on green grass"], 2: ["two cats"]}
    truth = {
        0: ["a red square at a1", "the red square"],
        1: ["a dog is running on the grass"],
        2: ["two cats", "two cats"],
    }
    bleu, _ = Bleu(4).compute_score(truth, given, verbose=0)
    cider, _ = Cider().compute_score(truth, given)
    assert found["cider"] == pytest.approx(cider, abs=0)
    assert [found[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu, abs=0)
    assert found["exact_match"] == pytest.approx(1 / 3)


def test_scores_computed_by_hand() -> None:
    pytest.importorskip("pycocoevalcap")
    references = [("a red square here",), ("blue ring on top",)]
    perfect = caption_scores(["A red square here.", "blue ring on top"], references)
    # every n-gram belongs to one image only, so each of the four cosines is 1
    assert perfect["cider"] == pytest.approx(10.0)
    assert perfect["bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert perfect["exact_match"] == 1.0
    swapped = caption_scores(["blue ring on top", "a red square here"], references)
    assert swapped["cider"] == 0.0
    # all 7 words are right, so what counts is the brevity penalty of 7 words against 8
    short = caption_scores(["a red square here", "blue ring top"], references)
    assert short["bleu_1"] == pytest.approx(math.exp(1 - 8 / 7), rel=1e-6)


def test_bad_sets_are_refused() -> None:
    pytest.importorskip("pycocoevalcap")
    with pytest.raises(DataError, match="means nothing below 2"):
        caption_scores(["a"], [("a",)])
    with pytest.raises(DataError, match=r"1 of 2 images have no reference caption .* number 1"):
        caption_scores(["a", "b"], [("a",), ("...",)])
    with pytest.raises(DataError, match="2 captions but 3 sets"):
        caption_scores(["a", "b"], [("a",)] * 3)


def test_missing_scorers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ConfigError, match=r"pip install \"interlace-vlm\[eval\]\""):
        check_scorers()
