"""Embeddings of images and texts, from models that match the two (CLIP, SigLIP).

Legend: M images, K texts, D embedding size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from interlace._progress import track
from interlace.data.collate import Collator, processor_of
from interlace.data.sample_texts import single_images
from interlace.errors import DataError, FamilyError
from interlace.evaluate._common import batches, held_still
from interlace.models.handle import to_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from interlace.data.samples import Sample
    from interlace.evaluate._common import Options
    from interlace.models.handle import VLM

__all__ = ["embed_images", "embed_texts", "image_batch", "text_batch"]


def _pooled(output: Any) -> Tensor:
    embedding: Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return functional.normalize(embedding.float(), dim=-1).cpu()


def _joined(vlm: VLM, parts: Sequence[Tensor], what: str) -> Tensor:
    whole = torch.cat(list(parts))
    bad = ~whole.isfinite().all(dim=1)
    if bool(bad.any()):
        raise DataError(
            f"{vlm.name} embeds {what} {int(bad.nonzero()[0])} into values that are not finite "
            "(NaN or infinite). Use a wider dtype, check the checkpoint, or look with `score` at "
            "which layer it begins."
        )
    return whole


def _encoder(vlm: VLM, name: str) -> Any:
    method = getattr(vlm.model, name, None)
    if method is None:
        raise FamilyError(
            f"{vlm.name} ({type(vlm.model).__name__}) has no {name}, so it cannot embed. "
            "Retrieval works with models such as CLIP and SigLIP."
        )
    return method


def image_batch(vlm: VLM, samples: Sequence[Sample]) -> dict[str, Any]:
    """Batch the image of every sample for the image encoder, on the model's device."""
    processor = processor_of(vlm)
    read = getattr(processor, "image_processor", processor)
    return to_model(dict(read(images=single_images(samples), return_tensors="pt")), vlm)


def text_batch(vlm: VLM, texts: Sequence[str]) -> dict[str, Any]:
    """Batch texts for the text encoder, padded as the family was trained, on its device."""
    return to_model(Collator.for_model(vlm).texts(texts), vlm)


def embed_images(vlm: VLM, samples: Sequence[Sample], options: Options) -> Tensor:
    """Embed the image of every sample.

    Returns:
        [M, D] fp32 on the CPU, every row of length 1.

    Raises:
        FamilyError: the model has no image encoder of its own.
        DataError: an embedding is not finite.
    """
    encode = _encoder(vlm, "get_image_features")
    with held_still(vlm.model):
        parts = [
            _pooled(encode(**image_batch(vlm, chunk)))
            for chunk in track(
                batches(samples, options.batch_size),
                description=f"embedding images{options.whose}",
            )
        ]
    return _joined(vlm, parts, "image")


def embed_texts(vlm: VLM, texts: Sequence[str], options: Options) -> Tensor:
    """Embed texts.

    Returns:
        [K, D] fp32 on the CPU, every row of length 1.

    Raises:
        FamilyError: the model has no text encoder of its own.
        DataError: an embedding is not finite.
    """
    encode = _encoder(vlm, "get_text_features")
    size = options.batch_size
    chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
    with held_still(vlm.model):
        parts = [
            _pooled(encode(**text_batch(vlm, chunk)))
            for chunk in track(chunks, description=f"embedding captions{options.whose}")
        ]
    return _joined(vlm, parts, "text")
