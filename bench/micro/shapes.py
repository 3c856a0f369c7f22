"""Sizes of real models, as their published config.json gives them, and one tiny model.

Where a config leaves something to the code, as the epsilon of Qwen3-VL's vision norms, it is
what transformers does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tower:
    """A stack of transformer layers.

    Attributes:
        layers: number of layers; there is one more hidden state.
        hidden: hidden size D.
        query_heads: query heads per layer.
        kv_heads: key-value heads per layer.
        head_dim: size of a head.
        intermediate: width of the feed-forward part.
        norm: "rms" (RMSNorm) or "layer" (LayerNorm).
        norm_eps: epsilon of the norms.
        causal: whether attention looks back only.
        qk_norm: whether queries and keys have an RMSNorm per head.
        rope_theta: base of the rotary embedding; None for a tower without.
        mrope_section: frequencies per axis (time, height, width) of an interleaved m-rope; empty
            for the 1-D one.
        tokens: tokens of one image, or the longest text where the model has a small bound.
    """

    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm: str
    norm_eps: float
    causal: bool
    qk_norm: bool = False
    rope_theta: float | None = None
    mrope_section: tuple[int, ...] = ()
    tokens: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model, as far as kernels can tell.

    Attributes:
        name: as `--shapes` takes it.
        source: the checkpoint whose config it repeats.
        text: the language model or text encoder.
        vision: the image encoder.
    """

    name: str
    source: str
    text: Tower
    vision: Tower

    @property
    def main(self) -> Tower:
        """The tower with the most numbers in its hidden states."""
        return max(self.text, self.vision, key=lambda tower: tower.layers * tower.hidden)


_QWEN = {"norm": "rms", "norm_eps": 1e-6, "causal": True, "qk_norm": True, "rope_theta": 5e6}
_CLIP = {"norm": "layer", "norm_eps": 1e-5}
_QWEN_VISION = {"norm": "layer", "norm_eps": 1e-6, "causal": False, "rope_theta": 1e4}
_CLIP_VISION = Tower(24, 1024, 16, 16, 64, 4096, **_CLIP, causal=False, tokens=257)
# the same encoder at 336 x 336 pixels
_LLAVA_VISION = Tower(24, 1024, 16, 16, 64, 4096, **_CLIP, causal=False, tokens=577)

SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape(
            "qwen3-vl-8b",
            "Qwen/Qwen3-VL-8B-Instruct",
            text=Tower(36, 4096, 32, 8, 128, 12288, **_QWEN, mrope_section=(24, 20, 20)),
            vision=Tower(27, 1152, 16, 16, 72, 4304, **_QWEN_VISION),
        ),
        ModelShape(
            "qwen3-vl-4b",
            "Qwen/Qwen3-VL-4B-Instruct",
            text=Tower(36, 2560, 32, 8, 128, 9728, **_QWEN, mrope_section=(24, 20, 20)),
            vision=Tower(24, 1024, 16, 16, 64, 4096, **_QWEN_VISION),
        ),
        ModelShape(
            "llava-1.5-7b",
            "llava-hf/llava-1.5-7b-hf",
            text=Tower(32, 4096, 32, 32, 128, 11008, "rms", 1e-5, causal=True, rope_theta=1e4),
            vision=_LLAVA_VISION,
        ),
        ModelShape(
            "clip-l",
            "openai/clip-vit-large-patch14",
            text=Tower(12, 768, 12, 12, 64, 3072, **_CLIP, causal=True, tokens=77),
            vision=_CLIP_VISION,
        ),
        ModelShape(
            "tiny",
            "no checkpoint: small enough for tests",
            text=Tower(6, 256, 4, 2, 64, 512, **_QWEN, mrope_section=(12, 10, 10)),
            vision=Tower(3, 128, 2, 2, 64, 256, **_QWEN_VISION),
        ),
    )
}

# what is timed when --shapes is not given
DEFAULT = ("qwen3-vl-8b",)
