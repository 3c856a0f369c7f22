"""The architectures, tokenizers and processors of the bundled models, before any training.

Each builder returns a randomly initialised transformers model and the processor that goes with it.
The sizes are the smallest that solve the built-in scenes with the depth that layer pruning needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from interlace.data.boards import IMAGE_SIZE
from interlace.data.scenes import vocabulary
from interlace.models.processor import without_video

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["BUILDERS", "build"]

# the usual 0.02 leaves models this small on the plateau of answering without looking
INIT_STD = 0.06
# normalised queries and keys of 32 dimensions give attention logits of at most 5.7 at gain 1, too
# flat to single out one of a hundred tokens, and the gains themselves learn slowly
QK_GAIN = 1.6
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
CHAT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def word_tokenizer(special: Sequence[str], **named: Any) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the scenes vocabulary.

    Args:
        special: special tokens; they take the first ids in this order.
        named: the roles that special tokens play, such as `pad_token`.

    Returns:
        A fast tokenizer that lower-cases, and splits at spaces and punctuation.
    """
    words = (*special, "[UNK]", "user", "assistant", "system", *vocabulary())
    table = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    if {"cls_token", "sep_token"} <= named.keys():
        first, last = named["cls_token"], named["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            special_tokens=[(first, table[first]), (last, table[last])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        extra_special_tokens=[token for token in special if token not in named.values()],
        **named,
    )


def build_qwen3_vl() -> tuple[PreTrainedModel, Any]:
    """Qwen3-VL with DeepStack: 16 text layers with 2 heads per KV group, 6 vision layers."""
    tokenizer = word_tokenizer(CHAT_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "initializer_range": INIT_STD,
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 6,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_heads": 4,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": (IMAGE_SIZE // 8) ** 2,
            "deepstack_visual_indexes": [1, 3],
            "initializer_range": INIT_STD,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(parameter, QK_GAIN)
    model.generation_config.update(
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"), do_sample=False
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return model, without_video(Qwen3VLProcessor, images, tokenizer, chat_template=CHAT_TEMPLATE)


def build_clip() -> tuple[PreTrainedModel, Any]:
    """CLIP with 12 vision and 12 text layers."""
    # transformers takes an end token of id 2 for an old configuration and pools at the token with
    # the highest id instead
    special = ("[PAD]", "[EOS]", "[BOS]")
    tokenizer = word_tokenizer(
        special, pad_token="[PAD]", cls_token="[BOS]", sep_token="[EOS]", eos_token="[EOS]"
    )
    tokenizer.model_max_length = 48
    tower = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 48,
            "bos_token_id": tokenizer.convert_tokens_to_ids("[BOS]"),
            "eos_token_id": tokenizer.convert_tokens_to_ids("[EOS]"),
            "pad_token_id": tokenizer.convert_tokens_to_ids("[PAD]"),
        },
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 16},
        projection_dim=96,
    )
    model = CLIPModel(config)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return model, CLIPProcessor(images, tokenizer)


def build_blip() -> tuple[PreTrainedModel, Any]:
    """BLIP captioner with 8 vision and 12 text decoder layers."""
    special = ("[PAD]", "[CLS]", "[SEP]")
    tokenizer = word_tokenizer(special, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer.model_max_length = 64
    first, last, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("[CLS]", "[SEP]", "[PAD]"))
    config = BlipConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "encoder_hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": INIT_STD,
            # the decoder starts from the token that the tokenizer puts in front
            "bos_token_id": first,
            "eos_token_id": last,
            "sep_token_id": last,
            "pad_token_id": pad,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            # label smoothing would hide whether a caption is exactly right
            "label_smoothing": 0.0,
        },
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            "initializer_range": INIT_STD,
        },
        projection_dim=96,
        image_text_hidden_size=96,
        initializer_range=INIT_STD,
    )
    model = BlipForConditionalGeneration(config)
    images = BlipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return model, BlipProcessor(images, tokenizer)


BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "qwen3-vl": build_qwen3_vl,
    "clip": build_clip,
    "blip": build_blip,
}


def build(name: str, *, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """Build one of the bundled architectures with fresh weights.

    Args:
        name: "qwen3-vl", "clip" or "blip".
        seed: of the initialisation.

    Returns:
        (model in fp32, processor).
    """
    torch.manual_seed(seed)
    return BUILDERS[name]()
