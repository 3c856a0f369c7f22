"""Samples to batches that `model(**batch)` accepts, for every kind of model.

Legend: B batch, T tokens (padding included), -100 a label that the loss ignores.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from interlace._torch_utils import accepts
from interlace.data.chat import ChatText, expanded_positions, spoken_tokens
from interlace.data.sample_texts import (
    answer,
    blip2_prompt,
    caption,
    is_caption,
    question,
    single_images,
)
from interlace.errors import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from interlace.data.chat import Rendered
    from interlace.data.samples import Sample

logger = logging.getLogger(__name__)

IGNORED = -100
OBJECTIVES = ("chat", "contrastive", "caption", "vqa")
# Tokenizers without a limit of their own report a number far above any real length.
_NO_LIMIT = 10**6

Batch = dict[str, Any]


class Collator:
    """Makes batches of samples with a model's own processor.

    What a batch holds, by objective:
    - chat: the whole conversation padded on the right, `labels` [B, T] int64 with the tokens of the
      assistant's turns, end-of-turn token included. Without answers: everything up to the last user
      turn and the prompt for the answer, padded on the left.
    - contrastive: images and one caption each; SigLIP is padded to its full length and gets no
      attention mask, as it was trained.
    - caption: BLIP gets its caption with labels, without answers the images alone. BLIP-2 gets a
      prompt in front ("Question: ... Answer:", nothing for captions) and labels of the answer.
    - vqa: `input_ids` are the question; decoder ids and labels are the answer.

    Args:
        processor: The processor that came with the model.
        objective: `family.objective` of the model.
        answers: Whether the batch holds answers and labels (training), or prompts (generation).
        max_length: Longest sequence in tokens, images included. Never cut: a longer sample is left
            out of a training batch with a warning, and refused where there are no answers.
            Captions alone are cut, to what the tokenizer states where this is None.
        seed: Which of several captions a sample trains with; fixed per sample and seed.
        start_token_id: First token of BLIP's decoder (`config.text_config.bos_token_id`), where it
            is another than the one the tokenizer puts in front.
        encoder_decoder: Whether the language model of BLIP-2 reads the prompt in an encoder of its
            own (T5), so that the answer alone stands in the labels.
        token_types: Whether the model takes `token_type_ids`; where it does, even zeros say
            something.
    """

    def __init__(
        self,
        processor: Any,
        objective: str,
        *,
        answers: bool = True,
        max_length: int | None = None,
        seed: int = 0,
        start_token_id: int | None = None,
        encoder_decoder: bool = False,
        token_types: bool = False,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ConfigError(unknown_name("objective", objective, OBJECTIVES))
        if processor is None:
            raise ConfigError("No processor is given; open the model with its processor.")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length is {max_length}; give a number of tokens of at least 1.")
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._objective = objective
        self._answers = answers
        self._max_length = max_length
        self._seed = seed
        self._start_token_id = start_token_id
        self._encoder_decoder = encoder_decoder
        self._token_types = token_types
        self._chat = ChatText(processor)
        self._blip2 = "Blip2" in type(processor).__name__

    @classmethod
    def for_model(cls, vlm: Any, *, answers: bool = True, seed: int = 0) -> Collator:
        """Make the collator that a model needs, as its config says.

        Args:
            vlm: The `VLM`, opened with its processor.
            answers: See the class.
            seed: See the class.

        Raises:
            ConfigError: The model was opened without a processor.
        """
        text: Any = getattr(vlm.model.config, "text_config", None)
        objective = vlm.family.objective
        limit = getattr(text, "max_position_embeddings", None)
        start = getattr(text, "bos_token_id", None)
        return cls(
            processor_of(vlm),
            objective,
            answers=answers,
            max_length=limit if objective == "contrastive" else None,
            seed=seed,
            start_token_id=start if objective in ("caption", "vqa") else None,
            encoder_decoder=bool(getattr(text, "is_encoder_decoder", False)),
            token_types=accepts(vlm.model, "token_type_ids"),
        )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Make one batch on the CPU.

        Raises:
            DataError: A sample that the objective or the processor cannot take, too long without
                being allowed to leave it out, or an image that cannot be read.
        """
        if not samples:
            raise DataError("A batch of no samples cannot be made; give at least one.")
        make: Callable[[Sequence[Sample]], Batch] = {
            "chat": self._chat_batch,
            "contrastive": self._contrastive_batch,
            "caption": self._blip2_batch if self._blip2 else self._caption_batch,
            "vqa": self._vqa_batch,
        }[self._objective]
        batch = make(samples)
        return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """Give the text that each sample is asked with, images as one token each."""
        if self._objective == "chat":
            return [self._chat.prompt(sample) for sample in samples]
        if self._objective == "vqa":
            return [question(sample) for sample in samples]
        if self._objective == "caption" and self._blip2:
            return [blip2_prompt(sample) for sample in samples]
        return ["" for _ in samples]

    def _chat_batch(self, samples: Sequence[Sample]) -> Batch:
        rendered: list[Rendered] = []
        if self._answers and not self._chat.prefixed:
            rendered = list(map(self._chat.conversation, samples))
        texts = [each.text for each in rendered] or list(map(self._chat.prompt, samples))
        # One list per sample: some processors count them, LLaVA-OneVision treats several otherwise.
        images = [[image.open() for image in item.images] for item in samples]
        options: dict[str, Any] = {"padding_side": "right" if self._answers else "left"}
        if self._answers and not rendered:
            options["suffix"] = [self._chat.suffix(sample) for sample in samples]
        bos = self._tokenizer.bos_token
        if bos and texts[0].startswith(bos):
            options["add_special_tokens"] = False
        seen = images if any(images) else None
        batch = self._process(samples, text=texts, images=seen, padding=True, **options)
        kept = self._short_enough(samples, _filled(batch), self._max_length)
        if len(kept) < len(samples):
            return self._chat_batch(kept)
        if rendered:
            batch["labels"] = self._chat_labels(samples, rendered, batch, options)
        elif not self._answers:
            # PaliGemma's processor makes labels, those of its suffix, also where there is none
            batch.pop("labels", None)
        return batch

    def _chat_labels(
        self,
        samples: Sequence[Sample],
        rendered: Sequence[Rendered],
        batch: Batch,
        options: Mapping[str, Any],
    ) -> Tensor:
        labels = torch.full_like(batch["input_ids"], IGNORED)
        image_id = self._tokenizer.convert_tokens_to_ids(self._chat.image_token)
        special = options.get("add_special_tokens", True)
        for row, (sample, item) in enumerate(zip(samples, rendered, strict=True)):
            ids, spoken = spoken_tokens(self._tokenizer, item.text, item.spans, special)
            valid = batch["attention_mask"][row].bool()
            expanded = batch["input_ids"][row][valid].tolist()
            where = expanded_positions(ids, expanded, image_id)
            said = [(ids[i], where[i]) for i, is_spoken in enumerate(spoken) if is_spoken]
            columns = valid.nonzero().flatten()
            for token, position in said:
                if position is None:
                    raise DataError(
                        f"Sample {sample.id!r}: the tokens of its text are not found again behind "
                        "the expanded images, so its answer cannot be located. The processor "
                        f"{type(self._processor).__name__} is not supported for training."
                    )
                labels[row, columns[position]] = token
            if not said:
                raise DataError(f"Sample {sample.id!r}: its answers hold no tokens. Remove it.")
        return labels

    def _contrastive_batch(self, samples: Sequence[Sample]) -> Batch:
        captions = list(map(self._caption, samples))
        return self._contrastive(samples, text=captions, images=single_images(samples))

    def texts(self, texts: Sequence[str]) -> Batch:
        """Make a batch of texts without images, as a contrastive model reads them."""
        return self._contrastive((), text=list(texts))

    def _contrastive(self, samples: Sequence[Sample], **inputs: Any) -> Batch:
        siglip = "Siglip" in type(self._processor).__name__
        limit = self._text_limit()
        if siglip and limit is None:
            raise DataError(
                "SigLIP is padded to its full length, which this tokenizer does not state; give it "
                "as max_length (config.text_config.max_position_embeddings)."
            )
        batch = self._process(
            samples,
            **inputs,
            padding="max_length" if siglip else True,
            **({} if limit is None else {"truncation": True, "max_length": limit}),
        )
        if siglip:
            batch.pop("attention_mask", None)
        return batch

    def _caption_batch(self, samples: Sequence[Sample]) -> Batch:
        images = single_images(samples)
        if not self._answers:
            return self._process(samples, images=images)
        batch = self._process(samples, images=images, **self._text(map(self._caption, samples)))
        self._start(batch["input_ids"])
        batch["labels"] = _targets(batch["input_ids"], batch["attention_mask"])
        return batch

    def _vqa_batch(self, samples: Sequence[Sample]) -> Batch:
        read = self._lengths(map(question, samples))
        if self._answers:
            read = [
                max(pair) for pair in zip(read, self._lengths(map(answer, samples)), strict=True)
            ]
        kept = self._short_enough(samples, read, self._text_limit())
        if len(kept) < len(samples):
            return self._vqa_batch(kept)
        images = single_images(samples)
        # The question is encoded with absolute positions, so it is never padded on the left.
        batch = self._process(samples, images=images, **self._text(map(question, samples)))
        if self._answers:
            said = self._tokenizer(return_tensors="pt", **self._text(map(answer, samples)))
            self._start(said["input_ids"])
            batch["decoder_input_ids"] = said["input_ids"]
            batch["decoder_attention_mask"] = said["attention_mask"]
            batch["labels"] = _targets(said["input_ids"], said["attention_mask"])
        return batch

    def _blip2_batch(self, samples: Sequence[Sample]) -> Batch:
        images = single_images(samples)
        prompts = [blip2_prompt(sample) for sample in samples]
        if self._encoder_decoder or not self._answers:
            side = "right" if self._encoder_decoder else "left"
            batch = self._process(
                samples, text=prompts, images=images, padding=True, padding_side=side
            )
            read = _filled(batch)
            self._short_enough(samples, read, self._max_length, may_drop=False)
            if self._answers:
                said = [self._reply(sample) for sample in samples]
                pairs = zip(samples, self._lengths(said), strict=True)
                read = [0 if is_caption(sample) else length for sample, length in pairs]
                kept = self._short_enough(samples, read, self._text_limit())
                if len(kept) < len(samples):
                    return self._blip2_batch(kept)
                texts = self._text(said)
                reply = self._tokenizer(return_tensors="pt", **texts)
                batch["labels"] = _targets(reply["input_ids"], reply["attention_mask"])
            return batch
        stop = self._blip2_stop()
        replies = [self._reply(sample) + stop for sample in samples]
        full = [
            f"{prompt} {reply}".strip(" ") for prompt, reply in zip(prompts, replies, strict=True)
        ]
        batch = self._process(samples, text=full, images=images, padding=True, padding_side="right")
        kept = self._short_enough(samples, _filled(batch), self._max_length)
        if len(kept) < len(samples):
            return self._blip2_batch(kept)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (prompt, text) in enumerate(zip(prompts, full, strict=True)):
            ids, spoken = spoken_tokens(self._tokenizer, text, ((len(prompt), len(text)),), True)
            end = int(batch["attention_mask"][row].sum())
            marked = [i if said else IGNORED for i, said in zip(ids, spoken, strict=True)]
            # The query tokens stand in front of the text, so the text ends where the row ends.
            labels[row, end - len(ids) : end] = torch.tensor(marked)
        batch["labels"] = labels
        return batch

    def _blip2_stop(self) -> str:
        """A line break where the vocabulary has one, as BLIP-2's OPT models were trained to end."""
        ids = self._tokenizer("\n", add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id:
            return "\n"
        return self._tokenizer.eos_token or ""

    def _process(self, samples: Sequence[Sample], **inputs: Any) -> Batch:
        try:
            batch = dict(self._processor(**inputs, return_tensors="pt"))
        except (ValueError, TypeError, IndexError, OSError) as error:
            names = ", ".join(repr(sample.id) for sample in samples[:8])
            raise DataError(
                f"The processor {type(self._processor).__name__} refuses a batch with the samples "
                f"{names}: {error}"
            ) from error
        kinds = batch.get("token_type_ids")
        if kinds is not None and not self._token_types and not kinds.any():
            # All zero for single texts, and most models do not take them.
            del batch["token_type_ids"]
        if "input_ids" in batch:
            # A batch of empty prompts would come out as floats.
            batch["input_ids"] = batch["input_ids"].long()
        return batch

    def _lengths(self, texts: Iterable[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(list(texts))["input_ids"]]

    def _short_enough(
        self,
        samples: Sequence[Sample],
        lengths: Sequence[int],
        limit: int | None,
        *,
        may_drop: bool = True,
    ) -> list[Sample]:
        if limit is None:
            return list(samples)
        pairs = list(zip(samples, lengths, strict=True))
        long = [(sample.id, length) for sample, length in pairs if length > limit]
        kept = [sample for sample, length in pairs if length <= limit]
        if not long:
            return kept
        names = ", ".join(f"{name!r} ({length} tokens)" for name, length in long[:5])
        if not kept or not self._answers or not may_drop:
            raise DataError(
                f"Longer than max_length={limit}: {names}. Raise max_length, make the "
                "images smaller, or remove the samples; a cut would go through images or answers."
            )
        logger.warning("left out, longer than %d tokens: %s", limit, names)
        return kept

    def _text_limit(self) -> int | None:
        stated = (self._max_length, self._tokenizer.model_max_length)
        limit = min((each for each in stated if each), default=_NO_LIMIT)
        return int(limit) if limit < _NO_LIMIT else None

    def _text(self, texts: Iterable[str]) -> dict[str, Any]:
        """Arguments for texts that are cut where they are captions, and short enough elsewhere."""
        limit = self._text_limit()
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        return {"text": list(texts), "padding": True, "padding_side": "right", **cut}

    def _start(self, input_ids: Tensor) -> None:
        if self._start_token_id is not None:
            input_ids[:, 0] = self._start_token_id

    def _caption(self, sample: Sample) -> str:
        return caption(sample, self._seed)

    def _reply(self, sample: Sample) -> str:
        return self._caption(sample) if is_caption(sample) else answer(sample)


def processor_of(vlm: Any) -> Any:
    """Give the processor of a model; ConfigError where it was opened without one."""
    if vlm.processor is None:
        raise ConfigError(
            f"{vlm.name} was opened without a processor, so it cannot be given images and text. "
            "Open it from a folder that holds one, or pass processor= to open_model."
        )
    return vlm.processor


def _targets(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return input_ids.masked_fill(attention_mask == 0, IGNORED)


def _filled(batch: Batch) -> list[int]:
    """Tokens of every row, padding left out."""
    lengths: list[int] = batch["attention_mask"].sum(dim=1).tolist()
    return lengths
