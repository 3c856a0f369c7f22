"""Processors of tiny vocabularies, in which a character is a token, and samples for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers as tf
from PIL import Image
from tiny import BOS, EOS, IMAGE, IMAGE_SIDE, NUM_PATCHES, PAD, PATCH_SIDE, VOCAB
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

from interlace.data.samples import Sample, Turn
from interlace.models.processor import without_video

if TYPE_CHECKING:
    import torch

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


# what processors of LLaVA are told about their vision tower
_TOWER = {
    "patch_size": PATCH_SIDE,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def llava(template: str | None = VICUNA) -> Any:
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=SIZE)
    return tf.LlavaProcessor(images, tokenizer(), chat_template=template, **_TOWER)


def llava_next() -> Any:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size=SIZE,
        image_grid_pinpoints=[[IMAGE_SIDE, IMAGE_SIDE]],
    )
    return tf.LlavaNextProcessor(images, tokenizer(), chat_template=VICUNA, **_TOWER)


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
