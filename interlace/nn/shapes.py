"""The modules of transformers that have a fused form, by the name of their class.

A class is listed where its forward was read and is the listed form. A class that is not listed is
left alone, whatever it looks like.
"""

from __future__ import annotations

from dataclasses import dataclass

from interlace.nn.layers import (
    AttentionState,
    FusedAttention,
    FusedBlipAttention,
    FusedVisionAttention,
)


@dataclass(frozen=True)
class BlockShape:
    """Names of the four parts of a block x + attention(norm(x)), x + mlp(norm(x))."""

    first_norm: str
    attention: str
    second_norm: str
    mlp: str


_LLAMA = BlockShape("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_CLIP = BlockShape("layer_norm1", "self_attn", "layer_norm2", "mlp")
_QWEN_VISION = BlockShape("norm1", "attn", "norm2", "mlp")
_PIXTRAL = BlockShape("attention_norm", "attention", "ffn_norm", "feed_forward")
BLOCKS = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen2VLDecoderLayer": _LLAMA,
    "Qwen2_5_VLDecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Qwen3VLTextDecoderLayer": _LLAMA,
    "Qwen3VLMoeTextDecoderLayer": _LLAMA,
    "GemmaDecoderLayer": _LLAMA,
    "CLIPEncoderLayer": _CLIP,
    "MetaClip2EncoderLayer": _CLIP,
    "ChineseCLIPVisionLayer": _CLIP,
    "SiglipEncoderLayer": _CLIP,
    "Siglip2EncoderLayer": _CLIP,
    "Idefics3EncoderLayer": _CLIP,
    "SmolVLMEncoderLayer": _CLIP,
    "BlipEncoderLayer": _CLIP,
    "Blip2EncoderLayer": _CLIP,
    "Qwen2VLVisionBlock": _QWEN_VISION,
    "Qwen2_5_VLVisionBlock": _QWEN_VISION,
    "Qwen3VLVisionBlock": _QWEN_VISION,
    "Qwen3VLMoeVisionBlock": _QWEN_VISION,
    "Qwen3_5VisionBlock": _QWEN_VISION,
    "Qwen3_5MoeVisionBlock": _QWEN_VISION,
    "Glm4vVisionBlock": _QWEN_VISION,
    "PixtralAttentionLayer": _PIXTRAL,
}

_TEXT = (FusedAttention, AttentionState(None, rope=True))
_ENCODER = (
    FusedAttention,
    AttentionState(None, rope=False, out="out_proj", scale="scale", dropout="dropout"),
)
_PACKED = (FusedVisionAttention, AttentionState(None, rope=True))
ATTENTIONS: dict[str, tuple[type, AttentionState]] = {
    "LlamaAttention": _TEXT,
    "MistralAttention": _TEXT,
    "Qwen2Attention": _TEXT,
    "Qwen2VLAttention": _TEXT,
    "Qwen2_5_VLAttention": _TEXT,
    "Qwen3Attention": _TEXT,
    "Qwen3VLTextAttention": _TEXT,
    "Qwen3VLMoeTextAttention": _TEXT,
    "GemmaAttention": _TEXT,
    "CLIPAttention": _ENCODER,
    "MetaClip2Attention": _ENCODER,
    "ChineseCLIPVisionAttention": _ENCODER,
    "SiglipAttention": _ENCODER,
    "Siglip2Attention": _ENCODER,
    "Idefics3VisionAttention": _ENCODER,
    "SmolVLMVisionAttention": _ENCODER,
    "VisionAttention": _PACKED,
    "Qwen2_5_VLVisionAttention": _PACKED,
    "Qwen3VLVisionAttention": _PACKED,
    "Qwen3VLMoeVisionAttention": _PACKED,
    "Qwen3_5VisionAttention": _PACKED,
    "Qwen3_5MoeVisionAttention": _PACKED,
    "Glm4vVisionAttention": _PACKED,
    **dict.fromkeys(
        # the second has heads that do not make up its width; see interlace.models.attention
        ("BlipAttention", "NarrowBlipAttention"),
        (FusedBlipAttention, AttentionState(None, rope=False)),
    ),
}

PATCH_EMBEDDINGS = frozenset(
    {
        "PatchEmbed",
        "Qwen2_5_VisionPatchEmbed",
        "Qwen3VLVisionPatchEmbed",
        "Qwen3VLMoeVisionPatchEmbed",
        "Qwen3_5VisionPatchEmbed",
        "Qwen3_5MoeVisionPatchEmbed",
        "Glm4vVisionPatchEmbed",
    }
)
GATED_MLPS = frozenset(
    {
        "LlamaMLP",
        "MistralMLP",
        "PixtralMLP",
        "GemmaMLP",
        "Gemma3MLP",
        "Qwen2MLP",
        "Qwen2_5_VLMLP",
        "Qwen3MLP",
        "Qwen3VLTextMLP",
        "Qwen3VLMoeTextMLP",
        "Qwen3_5MLP",
        "Qwen3_5MoeMLP",
        "Glm4VisionMlp",
    }
)
RMS_NORMS = frozenset(
    {
        "LlamaRMSNorm",
        "MistralRMSNorm",
        "Qwen2RMSNorm",
        "Qwen2VLRMSNorm",
        "Qwen2_5_VLRMSNorm",
        "Qwen3RMSNorm",
        "Qwen3VLTextRMSNorm",
        "Qwen3VLMoeTextRMSNorm",
        "InternVLVisionRMSNorm",
        "Idefics3RMSNorm",
        "Mistral3RMSNorm",
        "PixtralRMSNorm",
        "Glm4vRMSNorm",
    }
)
# blocks of other forms, and why they stay as they are
OTHER_BLOCKS = {
    "BlipTextLayer": "norms after its sublayers, not before",
    "ChineseCLIPTextLayer": "norms after its sublayers, not before",
    "Gemma3DecoderLayer": "norms after its sublayers too, not only before",
    "Glm4vTextDecoderLayer": "norms after its sublayers too, not only before",
    "InternVLVisionLayer": "a factor on what each sublayer adds",
    "Qwen3_5DecoderLayer": "recurrent layers among those that attend",
    "Qwen3_5MoeDecoderLayer": "recurrent layers among those that attend",
    "Blip2QFormerLayer": "norms after its sublayers, not before",
    "OPTDecoderLayer": "dropout between sublayer and add",
    "T5Block": "an RMSNorm before and dropout after each sublayer, inside the sublayer",
}
# attention layers without a fused form that call our attention by themselves
BY_INTERFACE = frozenset(
    {
        "Blip2Attention",
        "Blip2QFormerMultiHeadAttention",
        "OPTAttention",
        "ChineseCLIPTextSelfAttention",
        "Gemma3Attention",
        "Glm4vTextAttention",
        "InternVLVisionAttention",
        "PixtralAttention",
        "Qwen3_5Attention",
        "Qwen3_5MoeAttention",
    }
)
OTHER_ATTENTIONS = {
    "NarrowBlip2Attention": "computes attention itself, with heads that do not make up its width",
    "BlipTextSelfAttention": "computes attention itself, without a choice of implementation",
    "T5Attention": "adds a position bias to the scores, which the ops do not take",
}
