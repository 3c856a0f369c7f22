"""Batches for every kind of model; one character is one token, so that labels are exact."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from data.made import (
    FORGETFUL,
    blip,
    blip2,
    clip,
    llava,
    llava_next,
    llava_onevision,
    qwen,
    sample,
    siglip,
    spoken,
)
from tiny import IMAGE, TINY
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from interlace.data.chat import spoken_tokens
from interlace.data.collate import Collator
from interlace.data.samples import Turn
from interlace.errors import ConfigError, DataError
from interlace.models import open_model


def test_labels_are_the_answers_and_their_end() -> None:
    processor = qwen()
    samples = [
        sample("red. ", "no, blue\n"),
        sample("two", num_images=3),
        sample("x", num_images=0),
    ]
    batch = Collator(processor, "chat")(samples)
    assert spoken(processor, batch) == [
        "red. <|im_end|>|no, blue\n<|im_end|>",
        "two<|im_end|>",
        "x<|im_end|>",
    ]
    held = batch["labels"] != -100
    assert torch.equal(batch["labels"][held], batch["input_ids"][held])
    assert batch["attention_mask"][:, 0].all()
    assert (batch["input_ids"] == IMAGE).sum(dim=1).tolist() == [4, 12, 0]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * 4
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == IMAGE)
    assert set(batch) == {
        *("input_ids", "attention_mask", "labels", "pixel_values", "image_grid_thw"),
        "mm_token_type_ids",
    }


def test_prompts_end_where_the_answer_begins() -> None:
    processor = qwen()
    samples = [sample("red", "blue"), sample("a", num_images=2)]
    collator = Collator(processor, "chat", answers=False)
    batch = collator(samples)
    assert "labels" not in batch
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"][1, 0]
    decoded = [processor.tokenizer.decode(row) for row in batch["input_ids"]]
    for text, prompt, one in zip(decoded, collator.prompts(samples), samples, strict=True):
        assert text.replace("<pad>", "").replace("<|image_pad|>" * 4, "<|image_pad|>") == prompt
        assert prompt.endswith("?<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.count("<|image_pad|>") == len(one.images)
    assert "red" in decoded[0]
    assert "blue" not in decoded[0]


@pytest.mark.parametrize("make", [llava, llava_next, llava_onevision])
def test_llava_answers_are_closed_with_the_end_of_text(make: Any) -> None:
    processor = make()
    batch = Collator(processor, "chat")([sample("red", "blue"), sample("x", num_images=2)])
    assert spoken(processor, batch) == [" red| blue</s>", " x</s>"]


def test_a_processor_without_template_gets_a_plain_format() -> None:
    processor = llava(template=None)
    collator = Collator(processor, "chat")
    batch = collator([sample("red", "blue")])
    assert spoken(processor, batch) == [" red</s>| blue</s>"]
    assert collator.prompts([sample("red", "blue")]) == [
        "be brief USER: <image>\nq0? ASSISTANT: red</s>USER: q1? ASSISTANT:"
    ]


def test_a_template_of_the_tokenizer_alone_is_used() -> None:
    processor = llava(template=None)
    processor.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    collator = Collator(processor, "chat")
    assert collator.prompts([sample("red")]) == ["[user]<image>q0?[assistant]"]
    assert spoken(processor, collator([sample("red")])) == ["red</s>"]


def test_an_answer_that_ends_in_a_special_token_without_a_name_is_not_closed_again() -> None:
    processor = llava(template=None)
    processor.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<turn>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    end = AddedToken("<turn>", special=True)
    processor.tokenizer.backend_tokenizer.add_special_tokens([end])
    assert "<turn>" not in processor.tokenizer.all_special_tokens
    batch = Collator(processor, "chat")([sample("red", "blue")])
    assert spoken(processor, batch) == ["red<turn>|blue<turn>"]


def test_template_that_changes_earlier_turns_is_refused() -> None:
    collator = Collator(qwen(FORGETFUL), "chat")
    collator([sample("one")])
    with pytest.raises(DataError, match="renders turn 2 differently"):
        collator([sample("one", "two")])


def test_too_long_is_left_out_or_refused_and_never_cut(caplog: pytest.LogCaptureFixture) -> None:
    short, long = sample("a", name="short"), sample("a", num_images=5, name="long")
    processor = qwen()
    length = Collator(processor, "chat")([short])["input_ids"].shape[1]
    batch = Collator(processor, "chat", max_length=length)([long, short])
    assert batch["input_ids"].shape == (1, length)
    assert spoken(processor, batch) == ["a<|im_end|>"]
    assert "'long'" in caplog.text
    with pytest.raises(DataError, match=r"'long' \(\d+ tokens\)"):
        Collator(processor, "chat", max_length=length)([long])
    with pytest.raises(DataError, match="'long'"):
        Collator(processor, "chat", max_length=length, answers=False)([long, short])


def test_a_token_that_begins_in_front_of_the_answer_is_of_it() -> None:
    class Joined:
        """Takes a blank together with the word behind it, as many tokenizers do."""

        is_fast = True

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            offsets = [match.span() for match in re.finditer(r"\s?\S+", text)]
            return {"input_ids": list(range(len(offsets))), "offset_mapping": offsets}

    text = "USER: what? ASSISTANT: red disc</s>"
    start = text.index("red")
    _, spoken = spoken_tokens(Joined(), text, [(start, len(text))], True)
    assert spoken == [False, False, False, True, True]


def test_questions_and_answers_of_blip_are_never_cut(caplog: pytest.LogCaptureFixture) -> None:
    processor = blip()
    short, wordy = sample("red", name="short"), sample("0123456789" * 5, name="wordy")
    long = replace(short, id="long", turns=(Turn("user", "q" * 60), *short.turns[1:]))
    batch = Collator(processor, "vqa", max_length=20)([long, short, wordy])
    assert spoken(processor, batch) == ["<s>red</s>"]
    assert batch["pixel_values"].shape[0] == 1
    assert "'long' (62 tokens)" in caplog.text
    assert "'wordy' (52 tokens)" in caplog.text
    with pytest.raises(DataError, match="'long'"):
        Collator(processor, "vqa", max_length=20, answers=False)([long, short])


def test_what_a_batch_cannot_be_made_of() -> None:
    collator = Collator(qwen(), "chat")
    asked = sample("a")
    with pytest.raises(DataError, match="no assistant turn"):
        collator([replace(asked, turns=asked.turns[:1])])
    with pytest.raises(DataError, match=r"holds '<\|image_pad\|>' as text"):
        collator([replace(asked, turns=(Turn("user", "<image><|image_pad|>"), asked.turns[1]))])
    with pytest.raises(DataError, match="no samples"):
        collator([])
    with pytest.raises(DataError, match=r"refuses.*'s'"):
        collator([replace(asked, images=())])
    with pytest.raises(DataError, match="exactly one"):
        Collator(clip(), "contrastive")([sample("a", num_images=2)])
    with pytest.raises(ConfigError, match="Did you mean 'caption'"):
        Collator(blip(), "captoin")
    with pytest.raises(ConfigError, match="processor"):
        Collator(None, "chat")


def test_contrastive_takes_one_caption_per_seed() -> None:
    one = sample("aaa", "bb", "c", task="caption")
    texts = set()
    for seed in range(12):
        batch = Collator(clip(), "contrastive", seed=seed)([one, sample("dddd")])
        again = Collator(clip(), "contrastive", seed=seed)([sample("dddd"), one])
        assert torch.equal(batch["input_ids"][0], again["input_ids"][1])
        texts.add(clip().tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True))
    assert texts == {"aaa", "bb", "c"}
    assert batch["attention_mask"].sum(dim=1).tolist()[1] == 6
    long = Collator(clip(), "contrastive")([sample("x" * 100)])
    assert long["input_ids"].shape == (1, 40)


def test_siglip_is_padded_to_its_full_length_without_mask() -> None:
    batch = Collator(siglip(), "contrastive")([sample("a")])
    assert batch["input_ids"].shape == (1, 40)
    assert "attention_mask" not in batch
    endless = siglip()
    endless.tokenizer.model_max_length = 10**30
    with pytest.raises(DataError, match="max_length"):
        Collator(endless, "contrastive")([sample("a")])
    assert Collator(endless, "contrastive", max_length=9)([sample("a")])["input_ids"].shape == (
        1,
        9,
    )


def test_blip_caption() -> None:
    processor = blip()
    samples = [sample("red", task="caption"), sample("blue!", task="caption")]
    batch = Collator(processor, "caption", start_token_id=111)(samples)
    assert spoken(processor, batch) == ["<|im_end|>red</s>", "<|im_end|>blue!</s>"]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 7]
    assert set(Collator(processor, "caption", answers=False)(samples)) == {"pixel_values"}


def test_blip_vqa() -> None:
    processor = blip()
    batch = Collator(processor, "vqa")([sample("red"), sample("blue!", "no")])
    assert spoken(processor, batch) == ["<s>red</s>", "<s>blue!</s>"]
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "<s>q0?</s>"
    assert (batch["decoder_input_ids"] >= 0).all()
    asked = Collator(processor, "vqa", answers=False)([sample("red")])
    assert set(asked) == {"pixel_values", "input_ids", "attention_mask"}


def test_blip2_opt_learns_the_answer_behind_its_prompt() -> None:
    processor = blip2()
    samples = [sample("red", task="vqa"), sample("a longer caption", task="caption")]
    batch = Collator(processor, "caption")(samples)
    # the vocabulary has a line break, which ends a text as in BLIP-2's training
    assert spoken(processor, batch) == [" red\n", "a longer caption\n"]
    assert (batch["input_ids"] == IMAGE).sum(dim=1).tolist() == [5, 5]
    asked = Collator(processor, "caption", answers=False)
    assert asked.prompts(samples) == ["Question: q0? Answer:", ""]
    prompts = asked(samples)
    assert prompts["input_ids"].dtype == torch.int64
    assert prompts["attention_mask"].sum(dim=1).tolist() == [26, 5]
    assert prompts["attention_mask"][:, -1].tolist() == [1, 0]


def test_blip2_t5_has_the_answer_as_labels_of_the_decoder() -> None:
    processor = blip2()
    vlm = open_model(TINY["blip2_t5"](text=2, vision=2), processor=processor)
    batch = Collator.for_model(vlm)([sample("red", task="vqa"), sample("b", task="vqa")])
    assert spoken(processor, batch) == ["red", "b"]
    assert batch["input_ids"].shape == (2, 26)
    asked = [sample("red", task="caption"), sample("b", task="vqa")]
    prompts = Collator.for_model(vlm, answers=False)(asked)
    assert prompts["attention_mask"][:, -1].tolist() == [0, 1]


CASES = {
    "qwen2_vl": (qwen, "chat"),
    "qwen3_vl": (qwen, "chat"),
    "llava": (llava, "chat"),
    "llava_next": (llava_next, "chat"),
    "llava_onevision": (llava_onevision, "chat"),
    "clip": (clip, "contrastive"),
    "siglip": (siglip, "contrastive"),
    "blip_caption": (blip, "caption"),
    "blip_vqa": (blip, "vqa"),
    "blip2_opt": (blip2, "caption"),
    "blip2_t5": (blip2, "caption"),
}


@pytest.mark.parametrize("name", CASES)
def test_models_take_the_batch(name: str) -> None:
    make, objective = CASES[name]
    processor = make()
    several = 2 if objective == "chat" else 1
    samples = [sample("red", num_images=several), sample("longer answer", "no", num_images=1)]
    model = TINY[name](text=2, vision=2)
    vlm = open_model(model, processor=processor)
    assert vlm.family.objective == objective
    batch = Collator.for_model(vlm)(samples)
    with torch.no_grad():
        output = model(**batch)
        if objective != "contrastive":
            assert torch.isfinite(output.loss)
            asked = Collator.for_model(vlm, answers=False)(samples)
            assert len(model.generate(**asked, max_new_tokens=2)) == 2


def test_blanks_without_offsets_are_taught_as_well() -> None:
    # as byte-level tokenizers do that trim offsets
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {letter: number for number, letter in enumerate(letters)} | {"<s>": 300, "</s>": 301}
    words = Tokenizer(models.BPE(table, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = [("<s>", 300), ("</s>", 301)]
    words.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    text, answer = "ask: hi say:", " a   b c"
    ids, said = spoken_tokens(fast, text + answer, ((len(text), len(text + answer)),), True)
    taught = [token for token, spoken in zip(ids, said, strict=True) if spoken]
    assert fast.convert_ids_to_tokens(taught) == [*answer.replace(" ", "\u0120")]
    # without a prompt the answer starts where the tokens stand that the tokenizer adds
    answer = answer.strip()
    _, said = spoken_tokens(fast, answer, ((0, len(answer)),), True)
    assert said == [False, *[True] * len(answer), False]
