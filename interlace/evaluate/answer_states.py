"""The hidden states that predict the answer tokens, without computing logits for all tokens.

Legend: B batch, T tokens, D hidden size, V vocabulary, N answer tokens of a batch.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from interlace.errors import DataError, FamilyError, ShapeError
from interlace.evaluate._common import to_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from interlace.models.handle import VLM

__all__ = ["answer_states", "output_head"]

IGNORED = -100


def output_head(vlm: VLM) -> nn.Module:
    """Find the layer that turns hidden states into logits.

    Raises:
        FamilyError: the model has none, or not where transformers models keep it.
    """
    model = vlm.model
    owners = [model, *(getattr(model, name, None) for name in ("text_decoder", "language_model"))]
    for owner in owners:
        head = owner.get_output_embeddings() if hasattr(owner, "get_output_embeddings") else None
        if head is not None:
            found: nn.Module = head
            return found
    raise FamilyError(
        f"{vlm.name} ({type(model).__name__}) has no output head (get_output_embeddings gives "
        "none), so tokens cannot be compared. Leave out the tasks fidelity and perplexity."
    )


@contextlib.contextmanager
def _head_input(head: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect what enters the head, and let the head itself see the last token only.

    Yields:
        Two lists to be filled by a forward pass: the hidden states [B, T, D], and the logits of
        the last token [B, 1, V].
    """
    hidden: list[Tensor] = []
    last: list[Tensor] = []

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(args[0])
        return (args[0][:, -1:], *args[1:])

    def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        last.append(output)

    handles = (head.register_forward_pre_hook(narrow), head.register_forward_hook(keep))
    try:
        yield hidden, last
    finally:
        for handle in handles:
            handle.remove()


def _forward_arguments(vlm: VLM, batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Split a batch into what the forward pass takes and the label of every logit [B, T]."""
    batch = dict(batch)
    labels: Tensor = batch.pop("labels")
    language_model = getattr(vlm.model, "language_model", None)
    config = getattr(language_model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        # without labels the decoder's input has to be given; its logits are not shifted
        if "decoder_input_ids" not in batch:
            batch["decoder_input_ids"] = language_model._shift_right(labels)  # type: ignore[union-attr]
        return batch, labels
    if vlm.family.objective == "vqa" and "decoder_input_ids" not in batch:
        pad = getattr(vlm.model.config.text_config, "pad_token_id", None) or 0
        batch["decoder_input_ids"] = labels.masked_fill(labels == IGNORED, pad)
    # logit t predicts token t + 1; the last one predicts nothing
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return batch, shifted


def _same(one: Tensor, other: Tensor) -> bool:
    # two NaN count as the same: they are no sign of a change, and are reported elsewhere
    return torch.equal(one.to(other.dtype).nan_to_num(), other.nan_to_num())


def answer_states(vlm: VLM, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a model on a batch with answers and keep the states that predict answer tokens.

    Args:
        vlm: the model.
        batch: from a `Collator` with answers, on any device.

    Returns:
        Hidden states in front of the output head [N, D] in the model's dtype, and the token each
        should predict [N] int64.

    Raises:
        DataError: the batch has no answer token.
        FamilyError: the model changes its logits after the head, so that states in front of the
            head do not tell them.
    """
    arguments, labels = _forward_arguments(vlm, to_model(batch, vlm))
    with _head_input(output_head(vlm)) as (hidden, last):
        output = vlm.model(**arguments)
    logits = getattr(output, "logits", None)
    if logits is not None and not _same(logits[:, -1:], last[-1]):
        raise FamilyError(
            f"{vlm.name} ({type(vlm.model).__name__}) changes its logits after the output head "
            "(soft cap or scaling); fidelity and perplexity cannot be computed for it."
        )
    counted = labels != IGNORED
    if not bool(counted.any()):
        raise DataError(
            "A batch holds no answer token. Fidelity and perplexity need samples with an assistant "
            "turn; check the data, and that answers are not cut off."
        )
    states = hidden[-1]
    if states.shape[:2] != counted.shape:
        raise ShapeError(
            f"{vlm.name} gave hidden states {list(states.shape)} for labels {list(counted.shape)}; "
            "both need the same batch and token sizes."
        )
    return states[counted.to(states.device)], labels[counted]
