"""Qwen3.5, dense and with experts: most text layers are recurrent, by the gated delta rule.

Which attend stands in `layer_types`, which is cut with the layers. The cache reads its length from
one that attends.
"""

from __future__ import annotations

from interlace.models.family import Family
from interlace.models.kinds import keep_one_of, last_of

QWEN3_5 = Family(
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_moe"),
    objective="chat",
    architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
    advised=last_of("full_attention"),
    remapping=keep_one_of("full_attention"),
)
