"""Fidelity of models that match images and texts: embeddings and rankings against a teacher's.

Legend: M images, K distinct captions, D embedding size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from interlace.errors import ShapeError
from interlace.evaluate._common import TaskResult
from interlace.evaluate.divergence import token_divergence
from interlace.evaluate.embeddings import embed_images, embed_texts
from interlace.evaluate.retrieval import caption_pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interlace.data.samples import Sample
    from interlace.evaluate._common import Options
    from interlace.models.handle import VLM

__all__ = ["compare_embeddings"]

CHUNK_ROWS = 1024


def _row_sums(
    rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], scales: tuple[float, float]
) -> tuple[float, float]:
    """Sums over rows of KL(teacher || student) of softmaxed similarities, and of equal top-1."""
    divergence = agreeing = 0.0
    for start in range(0, len(rows[0]), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        student, teacher = (
            scale * (side[part] @ other.T)
            for side, other, scale in zip(rows, columns, scales, strict=True)
        )
        labels = torch.zeros(len(student), dtype=torch.int64)
        found = token_divergence(student, teacher, labels)
        divergence += found["divergence"]
        agreeing += found["agreeing"]
    return divergence, agreeing


def compare_embeddings(
    vlm: VLM, teacher: VLM, samples: Sequence[Sample], options: Options
) -> TaskResult:
    """Compare the embeddings of two models that match images and texts.

    Every metric is taken over all images and all distinct captions of the samples, not over
    batches, so none depends on the batch size.

    Returns:
        "image_cosine", "text_cosine": mean cosine of student and teacher embeddings;
        "image_to_text_kl", "text_to_image_kl": mean KL(teacher || student) in nats of the softmax
        over all captions (images), each model with its own temperature; "image_to_text_agreement",
        "text_to_image_agreement": fraction of queries with the same first result.
    """
    texts, _ = caption_pool(samples)
    sides = []
    for each in (vlm, teacher):
        images = embed_images(each, samples, options)
        captions = embed_texts(each, texts, options)
        scale = getattr(each.model, "logit_scale", None)
        sides.append((images, captions, 1.0 if scale is None else scale.float().exp().item()))
    images, captions, scales = zip(*sides, strict=True)
    if images[0].shape != images[1].shape or captions[0].shape != captions[1].shape:
        raise ShapeError(
            f"{vlm.name} embeds into {images[0].shape[1]} dimensions, the baseline {teacher.name} "
            f"into {images[1].shape[1]}. Give the model the student was pruned from."
        )
    to_text = _row_sums(images, captions, scales)
    to_image = _row_sums(captions, images, scales)
    metrics = {
        "image_cosine": (images[0] * images[1]).sum(dim=1).double().mean().item(),
        "text_cosine": (captions[0] * captions[1]).sum(dim=1).double().mean().item(),
        "image_to_text_kl": to_text[0] / len(samples),
        "text_to_image_kl": to_image[0] / len(texts),
        "image_to_text_agreement": to_text[1] / len(samples),
        "text_to_image_agreement": to_image[1] / len(texts),
    }
    return TaskResult(metrics, {"num_captions": len(texts), "unit_of_kl": "nats per query"})
