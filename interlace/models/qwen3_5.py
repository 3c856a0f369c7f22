"""Qwen3.5, dense and with experts: most text layers are recurrent, by the gated delta rule.

Which attend stands in `layer_types`, which is cut with the layers.
"""

from __future__ import annotations

from interlace.models.family import Family

QWEN3_5 = Family(
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_moe"),
    objective="chat",
    architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
)
