"""Image-text retrieval: R@1, R@5 and R@10 both ways over the pool that is given.

Legend: M images, K distinct captions, Q queries, D embedding size.

What counts as right: a caption is right for every image that has it among its references, so equal
captions of several images are right for all of them. Images are never taken to be equal. Ties go
against the model: a wrong candidate with the same similarity ranks before a right one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from interlace.errors import DataError, ShapeError
from interlace.evaluate._common import TaskResult
from interlace.evaluate.embeddings import embed_images, embed_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interlace.data.samples import Sample
    from interlace.evaluate._common import Options
    from interlace.models.handle import VLM

__all__ = ["caption_pool", "measure", "pool_scores", "ranks", "recall"]

CUTOFFS = (1, 5, 10)
CHUNK_QUERIES = 1024


def check_captions(samples: Sequence[Sample]) -> None:
    """Refuse images without a reference caption, with a DataError."""
    bare = [sample.id for sample in samples if not sample.references]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(samples)} images have no reference caption, the first is "
            f"'{bare[0]}'. Give Sample.references at least one caption each."
        )


def caption_pool(samples: Sequence[Sample]) -> tuple[list[str], list[list[int]]]:
    """Gather the distinct reference captions of a pool.

    Args:
        samples: one per image; `references` holds its captions.

    Returns:
        The K distinct captions in order of first appearance, and for each of the M images the
        positions of its captions in that list (a caption given twice stands twice).

    Raises:
        DataError: fewer than 2 images, or an image without a caption.
    """
    check_captions(samples)
    if len(samples) < 2:
        raise DataError(
            f"Retrieval was given {len(samples)} image(s); it needs a pool of at least 2."
        )
    positions: dict[str, int] = {}
    owned = [
        [positions.setdefault(text, len(positions)) for text in sample.references]
        for sample in samples
    ]
    return list(positions), owned


def ranks(queries: Tensor, candidates: Tensor, relevant: Sequence[Sequence[int]]) -> Tensor:
    """Rank of the best right candidate of every query.

    Args:
        queries: [Q, D] fp32.
        candidates: [C, D] fp32; similarity is the dot product.
        relevant: for each query the candidates that are right, at least one.

    Returns:
        [Q] int64, 1 is best: one more than the number of wrong candidates whose similarity is at
        least that of the best right one.

    Raises:
        ShapeError: sizes that do not fit each other.
        DataError: a similarity is not finite.
    """
    if queries.shape[1] != candidates.shape[1] or len(queries) != len(relevant):
        raise ShapeError(
            f"{list(queries.shape)} queries, {list(candidates.shape)} candidates and "
            f"{len(relevant)} sets of right candidates; expected [Q, D], [C, D] and Q."
        )
    found = []
    for start in range(0, len(queries), CHUNK_QUERIES):
        similarity = queries[start : start + CHUNK_QUERIES] @ candidates.T
        if not bool(torch.isfinite(similarity).all()):
            raise DataError(
                "Embeddings are not finite (NaN or infinite), so nothing can be ranked. "
                "Use a wider dtype, or check the checkpoint."
            )
        right = torch.zeros(similarity.shape, dtype=torch.bool)
        for row, columns in enumerate(relevant[start : start + CHUNK_QUERIES]):
            right[row, list(columns)] = True
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        found.append(1 + ((similarity >= best) & ~right).sum(dim=1))
    return torch.cat(found)


def recall(rank: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> dict[int, float]:
    """Fraction of queries whose rank is within each cutoff.

    Args:
        rank: [Q] int64, 1 is best.
        cutoffs: values of k.

    Returns:
        k -> R@k in 0..1.
    """
    return {k: (rank <= k).double().mean().item() for k in cutoffs}


def pool_scores(
    images: Tensor, captions: Tensor, owned: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Recall both ways.

    Args:
        images: [M, D] fp32.
        captions: [K, D] fp32, the distinct captions.
        owned: for each image the positions of its captions, at least one.

    Returns:
        "image_to_text_r1" .. "text_to_image_r10", fractions in 0..1. Image to text: any of the
        image's captions counts. Text to image: every caption of every image is one query.
    """
    holders: list[list[int]] = [[] for _ in range(len(captions))]
    for image, columns in enumerate(owned):
        for column in columns:
            holders[column].append(image)
    to_text = recall(ranks(images, captions, owned))
    rank = ranks(captions, images, holders)
    asked = torch.tensor([column for columns in owned for column in columns])
    to_image = recall(rank[asked])
    scores = {f"image_to_text_r{k}": value for k, value in to_text.items()}
    return scores | {f"text_to_image_r{k}": value for k, value in to_image.items()}


def measure(vlm: VLM, samples: Sequence[Sample], options: Options) -> TaskResult:
    """Embed the whole pool and search it both ways; see `pool_scores`."""
    texts, owned = caption_pool(samples)
    images = embed_images(vlm, samples, options)
    captions = embed_texts(vlm, texts, options)
    details = {
        "num_images": len(samples),
        "num_captions": len(texts),
        "num_text_queries": sum(len(columns) for columns in owned),
        "ties": "against the model; equal captions are right for every image that has them",
    }
    return TaskResult(pool_scores(images, captions, owned), details)
