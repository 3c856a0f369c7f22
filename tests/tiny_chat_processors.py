"""Processors of the chat models whose images become more than a run of one token.

Marks around images, rows and tiles are words of their own here, as they are in the real ones.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import tiny
import transformers as tf
from tiny_processors_base import SIDE, chat_template, word_tokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils import is_torchvision_available

from interlace.models.processor import without_video

if TYPE_CHECKING:
    from collections.abc import Mapping

_PIXTRAL = "transformers.models.pixtral"
# tokens of a tile: its patches, merged four to one
_PER_TILE = tiny.NUM_PATCHES // 4


def _tokenizer(marks: Mapping[str, int], attributes: Mapping[str, str] | None = None) -> Any:
    return word_tokenizer(limit=512, marks=marks, attributes=attributes)


def _square() -> dict[str, int]:
    return {"height": SIDE, "width": SIDE}


def gemma3_processor() -> Any:
    marks = {"<image>": tiny.IMAGE, "<boi>": tiny.VISION_START, "<eoi>": tiny.VISION_END}
    # blank lines around images, which merge with a line break of the text
    breaks = {"\n" * count: 110 + count for count in range(1, 5)}
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    return tf.Gemma3Processor(
        Gemma3ImageProcessorPil(size=_square()),
        _tokenizer(marks | breaks, names),
        image_seq_length=_PER_TILE,
        chat_template=chat_template("<boi>", head="\n", stop="[EOS]\n"),
    )


def glm4v_processor() -> Any:
    marks = {
        "<|image|>": tiny.IMAGE,
        "<|video|>": tiny.VIDEO,
        "<|begin_of_image|>": tiny.VISION_START,
        "<|end_of_image|>": tiny.VISION_END,
        "<|begin_of_video|>": 124,
        "<|end_of_video|>": 125,
    }
    images = Glm4vImageProcessorPil(
        patch_size=tiny.PATCH_SIDE,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2},
    )
    template = chat_template("<|begin_of_image|><|image|><|end_of_image|>")
    return without_video(tf.Glm4vProcessor, images, _tokenizer(marks), chat_template=template)


def internvl_processor() -> Any:
    marks = {
        "<IMG_CONTEXT>": tiny.IMAGE,
        "<video>": tiny.VIDEO,
        "<img>": tiny.VISION_START,
        "</img>": tiny.VISION_END,
    }
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return without_video(
        tf.InternVLProcessor,
        GotOcr2ImageProcessorPil(size=_square(), crop_to_patches=True, max_patches=3),
        _tokenizer(marks, names),
        image_seq_length=_PER_TILE,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )


def _idefics_marks() -> dict[str, int]:
    marks = {"<image>": tiny.IMAGE, "<video>": tiny.VIDEO, "<end_of_utterance>": 122}
    marks |= {"<fake_token_around_image>": 123, "<global-img>": 124}
    cells = [(row, column) for row in (1, 2) for column in (1, 2, 3)]
    return marks | {f"<row_{row}_col_{column}>": 110 + i for i, (row, column) in enumerate(cells)}


def _tiled() -> dict[str, Any]:
    return {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def idefics3_processor() -> Any:
    return tf.Idefics3Processor(
        Idefics3ImageProcessorPil(**_tiled()),
        _tokenizer(_idefics_marks()),
        image_seq_len=_PER_TILE,
        chat_template=chat_template("<image>", stop="<end_of_utterance>"),
    )


def smolvlm_processor() -> Any:
    # which it refuses to be without, and writes times of videos with
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    return without_video(
        tf.SmolVLMProcessor,
        SmolVLMImageProcessorPil(**_tiled()),
        _tokenizer(_idefics_marks()),
        image_seq_len=_PER_TILE,
        chat_template=chat_template("<image>", stop="<end_of_utterance>"),
    )


def mistral3_processor() -> Any:
    marks = {"[IMG]": tiny.IMAGE, "[IMG_BREAK]": tiny.VISION_START, "[IMG_END]": tiny.VISION_END}
    if not is_torchvision_available():
        # the processor's module takes one function of it, which the other has too
        pil = importlib.import_module(f"{_PIXTRAL}.image_processing_pil_pixtral")
        sys.modules.setdefault(f"{_PIXTRAL}.image_processing_pixtral", pil)
    module: Any = importlib.import_module(f"{_PIXTRAL}.processing_pixtral")
    patch = {"height": tiny.PATCH_SIDE, "width": tiny.PATCH_SIDE}
    return module.PixtralProcessor(
        PixtralImageProcessorPil(patch_size=patch, size={"longest_edge": SIDE}),
        _tokenizer(marks),
        patch_size=tiny.PATCH_SIDE,
        spatial_merge_size=2,
        chat_template=chat_template("[IMG]"),
    )


def paligemma_processor() -> Any:
    images = SiglipImageProcessorPil(size=_square())
    images.image_seq_length = tiny.NUM_PATCHES
    # the line break that ends a prefix
    return tf.PaliGemmaProcessor(images, _tokenizer({"<image>": tiny.IMAGE, "\n": 111}))
