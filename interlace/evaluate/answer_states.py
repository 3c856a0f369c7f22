"""The hidden states that predict the answer tokens, without computing logits for all tokens.

Legend: B batch, T tokens, D hidden size, V vocabulary, N answer tokens of a batch.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import DataError, FamilyError
from interlace.models.handle import to_model
from interlace.models.predictor import (
    IGNORED,
    aligned,
    find_head,
    is_encoder_decoder,
    model_inputs,
    targets_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from interlace.models.handle import VLM

__all__ = ["answer_states", "output_head"]


def output_head(vlm: VLM) -> tuple[nn.Module, nn.Module]:
    """Find the layer that turns hidden states into logits, and the part of the model it belongs to.

    Raises:
        FamilyError: the model has none, or not where transformers models keep it.
    """
    found = find_head(vlm.model)
    if found is None:
        raise FamilyError(
            f"{vlm.name} ({type(vlm.model).__name__}) has no output head (get_output_embeddings "
            "gives none), so tokens cannot be compared. Leave out the tasks fidelity and "
            "perplexity."
        )
    return found


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

    with head.register_forward_pre_hook(narrow), head.register_forward_hook(keep):
        yield hidden, last


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
    inputs = to_model(batch, vlm)
    head, owner = output_head(vlm)
    labels = targets_of(inputs["labels"], shift=not is_encoder_decoder(owner))
    with _head_input(head) as (hidden, last):
        output = vlm.model(**model_inputs(inputs, owner, vlm.family.objective))
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
    states = aligned(hidden[-1], labels)
    return states[counted.to(states.device)], labels[counted]
