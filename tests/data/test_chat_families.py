"""Batches of chat models whose images become more than a run of one token."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from data.made import spoken
from PIL import Image
from tiny_processors import BUILT, with_processor

from interlace.data.chat import ChatText
from interlace.data.collate import Collator
from interlace.data.samples import Sample, Turn
from interlace.errors import DataError

# PaliGemma takes one question and one answer: test_prefixes.py
CHAT = [
    name
    for name in sorted(BUILT)
    if with_processor(name).family.objective == "chat" and name != "paligemma"
]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@dataclass(frozen=True)
class _Picture:
    width: int
    height: int

    def open(self) -> Image.Image:
        gradient = Image.linear_gradient("L").resize((self.width, self.height))
        return Image.merge("RGB", (gradient, gradient.rotate(180), gradient.rotate(90)))


def _sample(name: str, sizes: tuple[tuple[int, int], ...], *turns: str) -> Sample:
    images = tuple(_Picture(*size) for size in sizes)
    said = [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(turns)]
    return Sample(name, "chat", images, tuple(said))


SAMPLES = [
    _sample("none", (), "what is this?", "a red circle"),
    _sample("one", ((64, 64),), "<image>\nwhat is this?", "a blue square"),
    _sample("wide", ((96, 32),), "<image>what is this?", "yes"),
    _sample("two", ((32, 32), (96, 48)), "<image><image>\nhow many?", "no"),
    _sample(
        "turns",
        ((32, 32), (64, 32)),
        *("a red <image> and?", "red square", "is <image> red?", "red square", "sure?", "no"),
    ),
]
ANSWERS = [["a red circle"], ["a blue square"], ["yes"], ["no"], ["red square", "red square", "no"]]


@pytest.mark.parametrize("name", CHAT)
def test_answers_are_found_behind_images_of_any_number_and_size(name: str) -> None:
    vlm = with_processor(name)
    for samples, answers in [
        (SAMPLES, ANSWERS),
        *([[s], [a]] for s, a in zip(SAMPLES, ANSWERS, strict=True)),
    ]:
        batch = Collator.for_model(vlm)(samples)
        rows = spoken(vlm.processor, batch)
        stops = set(vlm.processor.tokenizer.all_special_tokens)
        for row, answer in zip(rows, answers, strict=True):
            parts = row.split("|")
            for stop in stops:
                parts = [part.replace(stop, "") for part in parts]
            assert [part.strip() for part in parts] == answer


@pytest.mark.parametrize("name", CHAT)
def test_a_batch_predicts_what_its_samples_predict_alone(name: str) -> None:
    vlm = with_processor(name)
    collate = Collator.for_model(vlm)
    with torch.no_grad():
        batch = collate(SAMPLES)
        logits = vlm.model(**batch).logits
        for row, sample in enumerate(SAMPLES):
            alone = collate([sample])
            mask = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][mask].equal(alone["input_ids"][0])
            found = vlm.model(**alone).logits[0]
            torch.testing.assert_close(logits[row][mask], found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CHAT)
def test_what_stands_in_the_padding_reaches_no_answer(name: str) -> None:
    # nor the states of recurrent layers, which have to pass over it
    vlm = with_processor(name)
    asked = Collator.for_model(vlm, answers=False)(SAMPLES)
    padding = asked["attention_mask"] == 0
    assert padding[:, 0].any()
    word = vlm.processor.tokenizer.convert_tokens_to_ids("red")
    other = asked | {"input_ids": asked["input_ids"].masked_fill(padding, word)}
    settings = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
    said = [
        vlm.model.generate(**each, **settings, output_logits=True, return_dict_in_generate=True)
        for each in (asked, other)
    ]
    assert torch.stack(said[0].logits).equal(torch.stack(said[1].logits))


def test_without_a_chat_template_only_llava_has_a_format_of_its_own() -> None:
    processor = copy.deepcopy(with_processor("gemma3").processor)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(DataError, match="Gemma3Processor has no chat template"):
        ChatText(processor).prompt(SAMPLES[1])
