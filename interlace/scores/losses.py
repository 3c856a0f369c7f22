"""The loss that a model is trained for, sample by sample.

Legend: B samples, T tokens, V vocabulary.

    chat, caption, vqa    mean over a sample's answer tokens of -log p(token)
    contrastive, softmax  half the sum of the cross-entropies of a pair's row and column (CLIP)
    contrastive, sigmoid  -sum over the images of log sigmoid(z y), y = 1 or -1 (SigLIP)

The mean over the samples is the model's own loss where all answers are equally long (its own is the
mean over all tokens of a batch; BLIP's label smoothing is left out, as in healing). A contrastive
loss depends on the other samples of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from interlace.models.predictor import IGNORED, Predictor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from interlace.models.handle import VLM


class SampleLoss:
    """Computes the loss of every sample of a batch; keeps the graph where gradients are on."""

    def __init__(self, vlm: VLM) -> None:
        """Prepare to ask a model."""
        self._predictor = Predictor(vlm)

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run the model.

        Args:
            inputs: a batch as the collator gives it with answers, on the model's device.

        Returns:
            [B] losses, fp32 (fp64 for an fp64 model).

        Raises:
            DataError: no labels, a sample without any, or not as many images as texts.
            FamilyError: the model gives neither logits nor a head to make them with.
        """
        if self._predictor.contrastive:
            return self._contrastive(inputs)
        logits, targets = self._predictor.answers(inputs)
        entropy = functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
        )
        return entropy.sum(1) / (targets != IGNORED).sum(1)

    def _contrastive(self, inputs: Mapping[str, Any]) -> Tensor:
        logits = self._predictor.similarities(inputs)
        if self._predictor.sigmoid:
            signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
            return -functional.logsigmoid(signs * logits).sum(1)
        own = torch.arange(len(logits), device=logits.device)
        by_text = functional.cross_entropy(logits, own, reduction="none")
        by_image = functional.cross_entropy(logits.T, own, reduction="none")
        return (by_text + by_image) / 2
