"""The same samples give the same scores, however they are batched, packed, split or merged."""

from __future__ import annotations

import pytest
from scores.written_out import (
    TOLERANCE,
    batch_of,
    farthest,
    one_by_one,
    opened,
)
from tiny import TINY

from interlace.errors import ShapeError
from interlace.records import Scores
from interlace.scores import score
from interlace.scores.similarity import Similarity


@pytest.mark.parametrize("name", TINY)
def test_a_padded_batch_equals_its_samples_one_by_one(name: str) -> None:
    vlm, batch = opened(name), batch_of(name)
    together = score(vlm, [batch], progress=False)
    apart = score(vlm, one_by_one(batch), progress=False)
    assert set(together.towers) == set(vlm.towers)
    for tower in vlm.towers:
        # the decoder's attention to the question ignores its padding in transformers 5
        if (name, tower) != ("blip_vqa", "text"):
            assert farthest(together[tower], apart[tower]) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_vl", "qwen2_5_vl", "llava", "llava_onevision"])
def test_packed_rows_equal_single_samples(name: str) -> None:
    vlm, singles = opened(name), one_by_one(batch_of(name))
    packed = score(vlm, singles, packed=True, batch_size=2, progress=False)
    apart = score(vlm, singles, progress=False)
    for tower in vlm.towers:
        assert farthest(packed[tower], apart[tower]) < TOLERANCE


def test_the_full_matrix_holds_every_pack() -> None:
    vlm, batch = opened("llava"), batch_of("llava")
    whole = score(vlm, [batch], packs="all", progress=False)["text"]
    num_layers = whole.num_layers
    assert set(whole.similarity["all"]) == set(range(1, num_layers))
    assert set(whole.tail["all"]) == set(range(1, num_layers + 1))
    packs = tuple(range(1, num_layers))
    by_packs = score(vlm, [batch], packs=packs, towers=("text",), progress=False)["text"]
    for group, tables in by_packs.similarity.items():
        for pack, values in tables.items():
            assert whole.packs(pack, group) == pytest.approx(values, abs=TOLERANCE)


def test_scores_of_parts_merge_into_the_scores_of_the_whole() -> None:
    vlm, singles = opened("qwen3_vl"), one_by_one(batch_of("qwen3_vl", 4))
    # one sample has no image: the means of the vision tokens run over fewer samples
    text_only = {key: singles[1][key] for key in ("input_ids", "attention_mask")}
    text_only["input_ids"] = text_only["input_ids"].clamp(max=99)
    singles[1] = text_only
    whole = score(vlm, singles, progress=False)
    parts = [score(vlm, part, progress=False) for part in (singles[:1], singles[1:])]
    merged = Scores.merge(*parts)
    for tower in vlm.towers:
        assert farthest(merged[tower], whole[tower]) < 1e-12
    assert whole["text"].group_samples == {"all": 4, "text": 4, "vision": 3}


def test_meters_of_other_packs_do_not_merge() -> None:
    with pytest.raises(ShapeError, match="same metrics, towers and packs"):
        Similarity(6, (1, 2), whole=False).load_totals(
            Similarity(6, (1, 2, 3), whole=False).totals()
        )
