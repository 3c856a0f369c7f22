"""The loss of a sample is the model's own."""

from __future__ import annotations

import pytest
import torch
from scores.written_out import batch_of, labelled, one_by_one, opened
from tiny import TINY
from tiny_batches import PAIRS

from interlace.errors import DataError
from interlace.scores import score
from interlace.scores.losses import SampleLoss


@pytest.mark.parametrize("name", TINY)
def test_it_is_the_models_own(name: str) -> None:
    vlm, batch = opened(name), labelled(name)
    with torch.no_grad():
        losses = SampleLoss(vlm)(batch)
        if name in PAIRS:
            own = vlm.model(**batch, return_loss=True).loss[None]
            losses = losses.mean()[None]
        else:
            # one by one, the model's mean over tokens is that of one sample
            own = torch.stack([vlm.model(**single).loss for single in one_by_one(batch)])
    if name == "blip_vqa":
        # the decoder's attention to the question ignores its padding in transformers 5
        losses, own = losses[:1], own[:1]
    torch.testing.assert_close(losses, own, rtol=1e-5, atol=1e-5)


def test_batches_without_a_loss_are_refused() -> None:
    with pytest.raises(DataError, match="needs labels, but a batch holds only"):
        score(opened("llava"), [batch_of("llava")], metrics=("relevance",), progress=False)
    batch = labelled("llava")
    batch["labels"][1] = -100
    with pytest.raises(DataError, match="no answer token"):
        score(opened("llava"), [batch], metrics=("sensitivity",), progress=False)
    pairs = batch_of("clip")
    pairs["pixel_values"] = pairs["pixel_values"][:2]
    with pytest.raises(DataError, match="3 texts and 2 images"):
        score(opened("clip"), [pairs], metrics=("relevance",), progress=False)
