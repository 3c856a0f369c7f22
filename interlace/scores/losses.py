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

from interlace._torch_utils import accepts
from interlace.errors import ConfigError, DataError, FamilyError
from interlace.models.prediction import (
    IGNORED,
    aligned,
    find_head,
    is_encoder_decoder,
    model_inputs,
    targets_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from interlace.models.handle import VLM


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_gradients(vlm: VLM, metric: str) -> None:
    """Refuse a metric that needs gradients through weights that allow none.

    Raises:
        ConfigError: the weights are inference tensors.
    """
    if any(parameter.is_inference() for parameter in vlm.model.parameters()):
        raise ConfigError(
            f"The weights of {vlm.name} were made under torch.inference_mode(), so no gradient can "
            f"pass through them and '{metric}' cannot be scored. Open the model outside of it, or "
            "leave the metric out."
        )


class SampleLoss:
    """Computes the loss of every sample of a batch; keeps the graph where gradients are on."""

    def __init__(self, vlm: VLM) -> None:
        """Find the model's head and what its predictions line up with."""
        self._vlm = vlm
        self._objective = vlm.family.objective
        found = find_head(vlm.model) if self._objective != "contrastive" else None
        self._head = found[0] if found is not None else None
        self._owner: nn.Module = found[1] if found is not None else vlm.model
        self._shift = not is_encoder_decoder(self._owner)

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
        if self._objective == "contrastive":
            return self._contrastive(inputs)
        labels = inputs.get("labels")
        if not isinstance(labels, torch.Tensor):
            raise DataError(
                f"The loss of {self._vlm.name} needs labels, but a batch holds only "
                f"{', '.join(inputs)}. Give samples with answers, or batches collated with them."
            )
        targets = targets_of(labels, shift=self._shift)
        given = model_inputs(inputs, self._owner, self._objective)
        if accepts(self._vlm.model, "logits_to_keep"):
            # The logits of places that predict nothing of an answer would cost memory for nothing.
            places = (targets != IGNORED).any(0).nonzero().flatten()
            given["logits_to_keep"] = places
            targets = targets[:, places]
        logits = aligned(self._logits(given), targets)
        counted = targets != IGNORED
        if not bool(counted.any(1).all()):
            raise DataError(
                "A sample has no answer token, so it has no loss. Give every sample an answer, or "
                "leave it out."
            )
        entropy = functional.cross_entropy(
            _wide(logits).transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
        )
        return entropy.sum(1) / counted.sum(1)

    def _logits(self, given: Mapping[str, Any]) -> Tensor:
        caught: list[Tensor] = []
        handle = None
        if self._head is not None:
            # BLIP's question answerer makes logits and keeps them to itself.
            handle = self._head.register_forward_hook(lambda *call: caught.append(call[2]))
        try:
            output = self._vlm.model(**given)
        finally:
            if handle is not None:
                handle.remove()
        logits = getattr(output, "logits", None)
        if logits is None and caught:
            logits = caught[-1]
        if not isinstance(logits, torch.Tensor):
            raise FamilyError(
                f"{type(self._vlm.model).__name__} gives neither logits nor a head to make them "
                "with, so metrics that need its loss cannot be scored. Leave them out of metrics."
            )
        return logits

    def _contrastive(self, inputs: Mapping[str, Any]) -> Tensor:
        logits = _wide(self._vlm.model(**inputs).logits_per_text)
        if logits.shape[0] != logits.shape[1]:
            raise DataError(
                f"A batch has {logits.shape[0]} texts and {logits.shape[1]} images; a contrastive "
                "loss needs one image for every text."
            )
        if hasattr(self._vlm.model, "logit_bias"):
            signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
            return -functional.logsigmoid(signs * logits).sum(1)
        own = torch.arange(len(logits), device=logits.device)
        by_text = functional.cross_entropy(logits, own, reduction="none")
        by_image = functional.cross_entropy(logits.T, own, reduction="none")
        return (by_text + by_image) / 2
