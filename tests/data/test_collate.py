"""Batches for every kind of model; one character is one token, so that labels are exact."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from tiny import BOS, EOS, IMAGE, IMAGE_SIDE, NUM_PATCHES, PAD, PATCH_SIDE, TINY, VOCAB
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from interlace.data.chat import spoken_tokens
from interlace.data.collate import Collator
from interlace.data.samples import Sample, Turn
from interlace.errors import ConfigError, DataError
from interlace.models import open_model
from interlace.models.processor import without_video

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
SIZE = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# ends a turn with a blank and no special token, and renders images first, as LLaVA-1.5 does
VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# drops what earlier answers said, as templates of reasoning models do
FORGETFUL = CHATML.replace(
    "{{ p['text'] }}",
    "{% if m['role'] != 'assistant' or loop.index0 == 0 and m is sameas messages[-1] %}"
    "{{ p['text'] }}{% endif %}",
)


@dataclass(frozen=True)
class Square:
    shade: int = 0
    height: int = IMAGE_SIDE

    def open(self) -> Image.Image:
        return Image.new("RGB", (IMAGE_SIDE, self.height), (self.shade, 10, 200))


def tokenizer(image_token: str = "<image>", *, ends: bool = False, limit: int | None = None) -> Any:
    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", IMAGE: image_token, IMAGE + 1: "<video>"}
    special |= {IMAGE + 2: "<|vision_start|>", IMAGE + 3: "<|vision_end|>"}
    special |= {110: "<|im_start|>", 111: "<|im_end|>"}
    table = {token: number for number, token in special.items()}
    table |= {character: 3 + place for place, character in enumerate(CHARACTERS)}
    fill = set(range(VOCAB)) - set(table.values())
    table |= {f"[fill{number}]": number for number in fill}
    made = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    if ends:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    chatml = image_token == "<|image_pad|>"
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>" if chatml else "</s>",
        extra_special_tokens=[
            token for number, token in special.items() if number not in (PAD, BOS, EOS)
        ],
    )
    if limit:
        fast.model_max_length = limit
    return fast


def qwen(template: str = CHATML) -> Any:
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIDE,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
    )
    words = tokenizer("<|image_pad|>")
    return without_video(tf.Qwen2VLProcessor, images, words, chat_template=template)


def llava(template: str | None = VICUNA) -> Any:
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=SIZE)
    return tf.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def llava_next() -> Any:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size=SIZE,
        image_grid_pinpoints=[[IMAGE_SIDE, IMAGE_SIDE]],
    )
    return tf.LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def llava_onevision() -> Any:
    images = LlavaOnevisionImageProcessorPil(
        size=SIZE, image_grid_pinpoints=[[IMAGE_SIDE, IMAGE_SIDE]]
    )
    return without_video(
        tf.LlavaOnevisionProcessor,
        images,
        tokenizer(),
        num_image_tokens=NUM_PATCHES,
        vision_feature_select_strategy="full",
        chat_template=VICUNA,
    )


def clip() -> Any:
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=SIZE)
    return tf.CLIPProcessor(images, tokenizer(ends=True, limit=40))


def siglip() -> Any:
    return tf.SiglipProcessor(SiglipImageProcessorPil(size=SIZE), tokenizer(ends=True, limit=40))


def blip() -> Any:
    return tf.BlipProcessor(BlipImageProcessorPil(size=SIZE), tokenizer(ends=True, limit=60))


def blip2() -> Any:
    return tf.Blip2Processor(BlipImageProcessorPil(size=SIZE), tokenizer(), num_query_tokens=5)


def sample(*answers: str, num_images: int = 1, name: str = "s", task: str = "chat") -> Sample:
    turns = [Turn("system", "be brief")] if len(answers) > 1 else []
    for number, answer in enumerate(answers):
        lead = "<image>\n" * num_images if number == 0 else ""
        turns += [Turn("user", f"{lead}q{number}?"), Turn("assistant", answer)]
    images = tuple(Square(shade) for shade in range(num_images))
    references = () if task == "chat" else answers
    return Sample(name, task, images, tuple(turns), references)


def spoken(processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """What the labels teach, row by row, runs of ignored positions shown as a bar."""
    rows = []
    for row in batch["labels"]:
        parts: list[list[int]] = [[]]
        for label in row.tolist():
            if label == -100:
                parts.append([])
            else:
                parts[-1].append(label)
        rows.append("|".join(processor.tokenizer.decode(part) for part in parts if part))
    return rows


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
