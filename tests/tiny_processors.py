"""Tiny random models of every kind, with processors that know the words of the scenes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import tiny
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from interlace.data.scenes import vocabulary
from interlace.models import open_model
from interlace.models.processor import without_video

if TYPE_CHECKING:
    from collections.abc import Callable

    from interlace.models import VLM

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ message['role'] + ' ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '[EOS]' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'assistant ' }}{%- endif -%}"
)
SIDE = tiny.IMAGE_SIDE


def word_tokenizer(*, frame: tuple[str, str] | None = None, limit: int = 64) -> Any:
    """The ids that the tiny configs expect; `frame` puts a first and a last token around texts."""
    table = {"[PAD]": tiny.PAD, "[BOS]": tiny.BOS, "[EOS]": tiny.EOS, "[END]": 3, "[UNK]": 4}
    words = ("user", "assistant", "question", ":", "answer", *vocabulary())
    table |= {word: number for number, word in enumerate(dict.fromkeys(words), start=5)}
    table |= {
        "<|image_pad|>": tiny.IMAGE,
        "<|video_pad|>": tiny.VIDEO,
        "<|vision_start|>": tiny.VISION_START,
        "<|vision_end|>": tiny.VISION_END,
    }
    # every id is a word, so that random models say something
    table |= {f"w{number}": number for number in set(range(tiny.VOCAB)) - set(table.values())}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    named = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    if frame:
        first, last = frame
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            special_tokens=[(first, table[first]), (last, table[last])],
        )
        named |= {"cls_token": first, "sep_token": last, "eos_token": last}
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=[word for word in table if word.startswith("<|")],
        **named,
    )
    fast.model_max_length = limit
    return fast


def _size() -> dict[str, int]:
    return {"height": SIDE, "width": SIDE}


def qwen_processor() -> Any:
    images = Qwen2VLImageProcessorPil(
        patch_size=tiny.PATCH_SIDE,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2},
    )
    return without_video(
        tf.Qwen3VLProcessor, images, word_tokenizer(limit=256), chat_template=CHAT_TEMPLATE
    )


def blip_processor() -> Any:
    return tf.BlipProcessor(
        BlipImageProcessorPil(size=_size()), word_tokenizer(frame=("[BOS]", "[EOS]"))
    )


def blip2_processor() -> Any:
    tokenizer = word_tokenizer()
    images = BlipImageProcessorPil(size=_size())
    processor = tf.Blip2Processor(images, tokenizer, num_query_tokens=5)
    # ids stay those of the tiny config, where the image token is no word of the tokenizer
    processor.image_token = tf.AddedToken("<|image_pad|>", normalized=False, special=True)
    return processor


def clip_processor() -> Any:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_size())
    return tf.CLIPProcessor(images, word_tokenizer(frame=("[BOS]", "[END]")))


def siglip_processor() -> Any:
    return tf.SiglipProcessor(SiglipImageProcessorPil(size=_size()), word_tokenizer(limit=64))


BUILT: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "qwen3_vl": (tiny.qwen3_vl, qwen_processor),
    "blip_caption": (tiny.blip_caption, blip_processor),
    "blip_vqa": (tiny.blip_vqa, blip_processor),
    "blip2_opt": (tiny.blip2_opt, blip2_processor),
    "blip2_t5": (tiny.blip2_t5, blip2_processor),
    "clip": (tiny.clip, clip_processor),
    "siglip": (tiny.siglip, siglip_processor),
}


@cache
def with_processor(name: str, seed: int = 0) -> VLM:
    """A tiny model by family name and seed; models are shared between tests."""
    build, processor = BUILT[name]
    return open_model(build(seed), processor=processor())
