"""Greedy text generation for every kind of model, independent of how samples are batched.

Legend: B batch, T prompt tokens (padding included).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from interlace._progress import track
from interlace.data.collate import Collator
from interlace.errors import ConfigError, DataError
from interlace.evaluate._common import (
    batches,
    held_still,
    tokenizer_of,
)
from interlace.models.handle import to_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from interlace.data.samples import Sample
    from interlace.evaluate._common import Options
    from interlace.models.handle import VLM

__all__ = ["GREEDY", "generate_texts", "prompt_batch"]

# the most probable token each time, whatever a checkpoint's own generation settings ask for; the
# tokens that they forbid (`bad_words_ids`, `suppress_tokens`) are never given, as elsewhere
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
}


class _NoNaN(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing, and stops where greedy choice would quietly take the first token."""

    def __init__(self, vlm: VLM, samples: Sequence[Sample]) -> None:
        self._vlm = vlm
        self._samples = samples

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = scores.isnan().any(dim=1)
        if bool(bad.any()):
            sample = self._samples[int(bad.nonzero()[0])]
            raise DataError(
                f"{self._vlm.name} gives NaN as logits for sample {sample.id!r}. Use a wider "
                "dtype, check the checkpoint, or look with `score` at which layer it begins."
            )
        return scores


def prompt_batch(vlm: VLM, samples: Sequence[Sample]) -> dict[str, Any]:
    """Batch the questions of samples, without answers, on the model's device.

    Args:
        vlm: the model; its processor makes the batch.
        samples: what is asked, at least one.

    Returns:
        Keyword arguments of `generate`; prompts are padded on the left, `input_ids` [B, T] int64.

    Raises:
        ConfigError: the model was opened without a processor.
    """
    return to_model(Collator.for_model(vlm, answers=False)(samples), vlm)


def check_room(vlm: VLM, max_new_tokens: int) -> None:
    """Refuse answers that are longer than the learned positions of BLIP's kind reach.

    Raises:
        ConfigError: names the limit; transformers would end in an index that is out of range.
    """
    config = vlm.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    learned = vlm.family.objective in ("caption", "vqa")
    if learned and isinstance(positions, int) and max_new_tokens > positions:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, but {vlm.name} has positions for {positions} "
            "tokens only. Give at most as many."
        )


def _equal_lengths(batch: dict[str, Any]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Split a batch into parts without padding: (rows, part)."""
    mask = batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        yield list(range(len(batch["input_ids"]))), batch
        return
    lengths = mask.sum(dim=1).tolist()
    for length in sorted(set(lengths)):
        rows = [row for row, each in enumerate(lengths) if each == length]
        part = {
            name: value[rows] if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        kept = part["attention_mask"][0].bool()
        for name in ("input_ids", "attention_mask"):
            part[name] = part[name][:, kept]
        yield rows, part


def _reads_in_encoder(vlm: VLM) -> bool:
    config = getattr(getattr(vlm.model, "language_model", None), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def _new_tokens(output: Tensor, batch: dict[str, Any]) -> Tensor:
    """Cut the prompt off; models that do not repeat the prompt give new tokens only."""
    prompt = batch.get("input_ids")
    if prompt is None:
        return output
    width = prompt.shape[1]
    if output.shape[1] >= width and torch.equal(output[:, :width], prompt):
        return output[:, width:]
    return output


def generate_texts(
    vlm: VLM, samples: Sequence[Sample], options: Options, *, description: str = "generating"
) -> list[str]:
    """Continue every sample's prompt greedily.

    The result does not depend on the batch size: prompts of decoders are padded on the left, and
    models that read the prompt in an encoder get parts of equal length only (BLIP's decoder would
    attend to padding of the question; T5's positions would shift).

    Args:
        vlm: a model that generates text.
        samples: the prompts (answers are left out).
        options: batch size and longest answer in tokens.
        description: what the progress bar says.

    Returns:
        One text per sample, in order, without special tokens and outer spaces.

    Raises:
        ConfigError: the model generates no text, or has no processor.
        DataError: its logits are NaN.
    """
    if vlm.family.objective == "contrastive":
        raise ConfigError(f"{vlm.name} compares images and texts; it generates no text.")
    tokenizer = tokenizer_of(vlm)
    unpadded = vlm.family.objective == "vqa" or _reads_in_encoder(vlm)
    order = list(range(len(samples)))
    if unpadded:
        # similar lengths side by side, so that few parts come out of each batch
        prompts = Collator.for_model(vlm, answers=False).prompts(samples)
        order.sort(key=lambda index: len(prompts[index]))
    chunks = batches([samples[index] for index in order], options.batch_size)
    texts: list[str] = []
    with held_still(vlm.model):
        for chunk in track(chunks, description=description + options.whose):
            batch = prompt_batch(vlm, chunk)
            answers = [""] * len(chunk)
            parts = _equal_lengths(batch) if unpadded else [(list(range(len(chunk))), batch)]
            for rows, part in parts:
                output = vlm.model.generate(
                    **part,
                    **GREEDY,
                    max_new_tokens=options.max_new_tokens,
                    logits_processor=LogitsProcessorList(
                        [_NoNaN(vlm, [chunk[row] for row in rows])]
                    ),
                )
                decoded = tokenizer.batch_decode(
                    _new_tokens(output, part), skip_special_tokens=True
                )
                for row, text in zip(rows, decoded, strict=True):
                    answers[row] = text.strip()
            texts.extend(answers)
    restored = [""] * len(samples)
    for place, text in zip(order, texts, strict=True):
        restored[place] = text
    return restored
