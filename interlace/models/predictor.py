"""What a model predicts for the answers of a batch, and which token every place predicts.

Legend: B samples, T tokens of the sequence that the head sees, D width of a token's row,
V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from interlace._torch_utils import accepts
from interlace.errors import ConfigError, DataError, FamilyError, ShapeError
from interlace.models.states import hooked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from interlace.models.handle import VLM

IGNORED = -100


def find_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the head and the (sub)model it belongs to, or None where there is no head."""
    # A model hands on the head of a part of it, which alone knows how its decoder is fed.
    for owner in (*model.children(), model):
        getter = getattr(owner, "get_output_embeddings", None)
        head = getter() if getter is not None else None
        if isinstance(head, nn.Module):
            return head, owner
    return None


def is_encoder_decoder(owner: nn.Module) -> bool:
    """Tell whether the model that owns the head reads its labels unshifted through a decoder."""
    return bool(getattr(getattr(owner, "config", None), "is_encoder_decoder", False))


def targets_of(labels: Tensor, *, shift: bool) -> Tensor:
    """Return the token that every place predicts, [B, T] int64, -100 where none counts."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift else labels


def model_inputs(batch: Mapping[str, Any], owner: nn.Module, objective: str) -> dict[str, Any]:
    """Return the keyword arguments of the forward pass, labels left out.

    A model that is given labels computes full logits for a loss of its own. The decoders that read
    their input from the labels get it here instead.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch.get("labels")
    if labels is None or "decoder_input_ids" in inputs:
        return inputs
    if is_encoder_decoder(owner):
        prepare: Any = owner.prepare_decoder_input_ids_from_labels
        inputs["decoder_input_ids"] = prepare(labels=labels)
    elif objective == "vqa":
        config: Any = getattr(owner, "config", None)
        padding = getattr(config, "pad_token_id", None) or 0
        inputs["decoder_input_ids"] = labels.masked_fill(labels == IGNORED, padding)
        inputs["decoder_attention_mask"] = (labels != IGNORED).long()
    return inputs


def for_states(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a pass that is run for its hidden states alone.

    Models that can be told so compute the logits of one token, and are given no labels, whose loss
    would need those of all. In others the labels may be what a decoder reads.
    """
    if not accepts(model, "logits_to_keep"):
        return dict(inputs)
    return {key: value for key, value in inputs.items() if key != "labels"} | {"logits_to_keep": 1}


def aligned(hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the places of `hidden` that `targets` [B, T] speaks of, [B, T, D].

    Raises:
        ShapeError: there are fewer places than labels.
    """
    places = hidden[:, -targets.shape[1] :]
    if places.shape[:2] != targets.shape:
        raise ShapeError(
            f"The labels have the shape {tuple(targets.shape)}, but the model predicts at "
            f"{tuple(hidden.shape[:2])} places. The collator does not fit this model."
        )
    return places


def check_gradients(vlm: VLM, refusal: str) -> None:
    """Refuse what needs gradients through weights that allow none.

    Args:
        vlm: the model.
        refusal: what cannot be done then, such as "'sensitivity' cannot be scored".

    Raises:
        ConfigError: the weights are inference tensors.
    """
    if any(parameter.is_inference() for parameter in vlm.model.parameters()):
        raise ConfigError(
            f"The weights of {vlm.name} were made under torch.inference_mode(), so no gradient can "
            f"pass through them and {refusal}. Open the model outside of it, or leave that out."
        )


class Predictor:
    """Runs a model on batches as the collator gives them with answers.

    Attributes:
        contrastive: its predictions are similarities of images and texts.
    """

    def __init__(self, vlm: VLM) -> None:
        """Find the model's head and what its predictions line up with."""
        self._vlm = vlm
        self._objective = vlm.family.objective
        self.contrastive = self._objective == "contrastive"
        found = None if self.contrastive else find_head(vlm.model)
        self._head = found[0] if found is not None else None
        self._owner: nn.Module = found[1] if found is not None else vlm.model
        self._shift = not is_encoder_decoder(self._owner)

    def answers(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Predict the tokens of the answers.

        Args:
            inputs: the batch, on the model's device.

        Returns:
            Logits [B, T, V] of some places, all that predict an answer among them, fp32 (fp64 for
            an fp64 model), and the tokens there [B, T], -100 where none counts.

        Raises:
            DataError: no labels, or a sample without any.
            FamilyError: the model gives neither logits nor a head to make them with.
        """
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
        if not bool((targets != IGNORED).any(1).all()):
            raise DataError(
                "A sample has no answer token, so it has no loss. Give every sample an answer, or "
                "leave it out."
            )
        return _wide(logits), targets

    def _logits(self, given: Mapping[str, Any]) -> Tensor:
        caught: list[Tensor] = []
        # BLIP's question answerer makes logits and keeps them to itself.
        heads = [] if self._head is None else [self._head]
        with hooked(
            head.register_forward_hook(lambda *call: caught.append(call[2])) for head in heads
        ):
            output = self._vlm.model(**given)
        logits = getattr(output, "logits", None)
        if logits is None and caught:
            logits = caught[-1]
        if not isinstance(logits, torch.Tensor):
            raise FamilyError(
                f"{type(self._vlm.model).__name__} gives neither logits nor a head to make them "
                "with, so metrics that need its loss cannot be scored. Leave them out of metrics, "
                "and fit bridges with token_weights='even'."
            )
        return logits

    def similarities(self, inputs: Mapping[str, Any]) -> Tensor:
        """Compare every text of a batch with every image: logits [B, B], a row per text, fp32.

        Raises:
            DataError: not as many images as texts.
        """
        logits = _wide(self._vlm.model(**inputs).logits_per_text)
        if logits.shape[0] != logits.shape[1]:
            raise DataError(
                f"A batch has {logits.shape[0]} texts and {logits.shape[1]} images; a contrastive "
                "loss needs one image for every text."
            )
        return logits

    @property
    def sigmoid(self) -> bool:
        """Whether a similarity says by itself how likely a pair is (SigLIP)."""
        return hasattr(self._vlm.model, "logit_bias")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
