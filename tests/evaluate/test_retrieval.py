from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from interlace.data.collate import Collator
from interlace.data.samples import Sample, samples
from interlace.errors import DataError, ShapeError
from interlace.evaluate._common import Options
from interlace.evaluate.embeddings import embed_images, embed_texts, text_batch
from interlace.evaluate.retrieval import caption_pool, measure, pool_scores, ranks, recall
from interlace.evaluate.speed import measure as measure_speed

if TYPE_CHECKING:
    from collections.abc import Callable

    from interlace.models import VLM


def ranked(similarity: list[list[float]], relevant: list[list[int]]) -> list[int]:
    """Ranks of a similarity table, written as dot products with unit vectors."""
    rows = torch.tensor(similarity)
    return ranks(rows, torch.eye(rows.shape[1]), relevant).tolist()


def test_ranks_by_hand() -> None:
    table = [[0.9, 0.5, 0.1, 0.0], [0.4, 0.3, 0.8, 0.6], [0.1, 0.2, 0.3, 0.4]]
    assert ranked(table, [[0], [0], [0]]) == [1, 3, 4]
    # of several right candidates the best counts, and the others are in nobody's way
    assert ranked(table, [[1, 2], [2, 3], [0, 2]]) == [2, 1, 2]


def test_ties_go_against_the_model() -> None:
    assert ranked([[0.5, 0.5, 0.5, 0.1]], [[0]]) == [3]
    assert ranked([[0.5, 0.5, 0.5, 0.1]], [[0, 1, 2]]) == [1]
    # a model that maps everything to one point finds nothing at random
    assert recall(ranks(torch.ones(4, 2), torch.ones(4, 2), [[0], [1], [2], [3]]))[1] == 0.0


def test_recall_at_several_cutoffs() -> None:
    assert recall(torch.tensor([1, 2, 5, 6, 11])) == {1: 0.2, 5: 0.6, 10: 0.8}


def test_several_captions_and_captions_in_common() -> None:
    pool = [
        Sample("0", "retrieval", (), (), ("a", "b")),
        Sample("1", "retrieval", (), (), ("b", "c")),
        Sample("2", "retrieval", (), (), ("d",)),
    ]
    texts, owned = caption_pool(pool)
    assert texts == ["a", "b", "c", "d"]
    assert owned == [[0, 1], [1, 2], [3]]
    images = torch.eye(3)
    # a -> image 2 (wrong), b -> image 0 (right for both), c -> image 1 (right), d -> image 2
    captions = torch.tensor([[0.1, 0.2, 0.9], [0.8, 0.7, 0.1], [0.2, 0.6, 0.1], [0.0, 0.1, 0.5]])
    scores = pool_scores(images, captions, owned)
    # five queries (b is asked for by two images): only "a" fails at 1, and is third
    assert scores["text_to_image_r1"] == pytest.approx(4 / 5)
    assert scores["text_to_image_r5"] == 1.0
    # image 0 finds b, image 1 finds b, image 2 finds "a" before d
    assert scores["image_to_text_r1"] == pytest.approx(2 / 3)


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="pool of at least 2"):
        caption_pool([Sample("0", "retrieval", (), (), ("a",))])
    with pytest.raises(DataError, match="first is '1'"):
        caption_pool([Sample("0", "retrieval", (), (), ("a",)), Sample("1", "retrieval", (), ())])
    with pytest.raises(DataError, match="not finite"):
        ranked([[0.1, float("nan")]], [[0]])
    with pytest.raises(ShapeError, match="expected"):
        ranks(torch.ones(2, 3), torch.ones(2, 4), [[0], [0]])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_embeddings_are_those_of_the_forward_pass(tiny_vlm: Callable[..., VLM], name: str) -> None:
    vlm = tiny_vlm(name)
    pool = samples("scenes", count=5, tasks=("retrieval",), split="test")
    texts, _ = caption_pool(pool)
    images = embed_images(vlm, pool, Options(batch_size=2))
    captions = embed_texts(vlm, texts, Options(batch_size=3))
    inputs = vlm.processor(
        text=texts,
        images=[sample.images[0].open() for sample in pool],
        padding="max_length" if name == "siglip" else True,
        return_tensors="pt",
    )
    inputs.pop("token_type_ids", None)
    if name == "siglip":
        inputs.pop("attention_mask")
    with torch.no_grad():
        output = vlm.model(**inputs)
    assert torch.allclose(images, output.image_embeds, atol=1e-5)
    assert torch.allclose(captions, output.text_embeds, atol=1e-5)
    assert measure(vlm, pool, Options(1)).metrics == measure(vlm, pool, Options(5)).metrics


@pytest.mark.parametrize(("tower", "what"), [("vision", "image"), ("text", "text")])
def test_embeddings_that_are_not_finite_are_an_error(
    tiny_vlm: Callable[..., VLM], tower: str, what: str
) -> None:
    vlm = tiny_vlm("clip")
    found = samples("scenes", count=3, tasks=("retrieval",), split="test")
    weight = next(vlm.towers[tower].layers[1].parameters())
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(DataError, match=f"embeds {what} 0 into values that are not finite"):
            measure(vlm, found, Options())
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_samples_that_cannot_be_embedded_are_refused_by_name(tiny_vlm: Callable[..., VLM]) -> None:
    vlm = tiny_vlm("clip")
    pool = list(samples("scenes", count=2, tasks=("retrieval",)))
    for images in ((), pool[0].images * 2):
        spoilt = [pool[0], replace(pool[1], id="odd", images=images)]
        with pytest.raises(DataError, match=r"'odd' has [02] images"):
            measure(vlm, spoilt, Options())
    bare = [replace(sample, references=()) for sample in pool]
    with pytest.raises(DataError, match="2 of 2 images have no reference caption"):
        measure_speed([vlm], bare, Options())


def test_captions_are_cut_to_the_lesser_of_both_limits(
    tiny_vlm: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = tiny_vlm("clip")
    positions = vlm.model.config.text_config.max_position_embeddings
    (sample,) = samples("scenes", count=1, tasks=("retrieval",))
    long = replace(sample, references=("word " * 100,))
    for limit, wanted in ((positions + 2, positions), (positions - 2, positions - 2)):
        monkeypatch.setattr(vlm.processor.tokenizer, "model_max_length", limit)
        assert text_batch(vlm, long.references)["input_ids"].shape[1] == wanted
        assert Collator.for_model(vlm)([long])["input_ids"].shape[1] == wanted
