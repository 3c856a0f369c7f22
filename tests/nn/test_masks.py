"""Attention by lengths equals attention by the Boolean mask, whatever is padded, cached or cut off.

Letters: B batch, T queries, K keys, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import masking_utils as patterns

from interlace import ops
from interlace.errors import BackendError, ShapeError
from interlace.nn import interlace_attention, interlace_mask
from interlace.nn.attention import head_groups
from interlace.nn.masks import pattern_of

LEFT = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
RIGHT = [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
BOTH = [[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
HOLES = [[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
WINDOW = patterns.sliding_window_causal_mask_function(3)


@dataclass(frozen=True)
class Scene:
    """One way in which a model asks for a mask.

    Attributes:
        name: of the test.
        queries: T.
        keys: K.
        padding: 2-D mask, [2, tokens so far].
        offset: position of the first query.
        kv_offset: position of the first key.
        function: pattern.
        lengths: the pattern can be told in lengths.
        others: further arguments of the mask function.
    """

    name: str
    queries: int
    keys: int
    padding: list[list[int]] | None = None
    offset: Any = 0
    kv_offset: int = 0
    function: Any = patterns.causal_mask_function
    lengths: bool = True
    others: dict[str, Any] = field(default_factory=dict)


BIDIRECTIONAL = patterns.bidirectional_mask_function
# as where None cannot stand for the mask
WHOLE = {"allow_is_causal_skip": False}
SCENES = [
    Scene("left", 6, 6, LEFT),
    Scene("right", 6, 6, RIGHT),
    Scene("both", 6, 6, BOTH),
    Scene("left, past", 2, 6, LEFT, 4),
    Scene("left, padding in the queries", 5, 6, LEFT, 1),
    Scene("left, decode", 1, 6, LEFT, 5),
    Scene("left, static prefill", 6, 9, LEFT, torch.tensor(0)),
    Scene("left, static, past", 2, 9, LEFT, torch.tensor(4)),
    Scene("left, static decode", 1, 9, LEFT, torch.tensor(5)),
    Scene("static decode", 1, 9, None, torch.tensor(5), others=WHOLE),
    Scene("window", 6, 6, LEFT, function=WINDOW),
    Scene("window, right", 6, 6, RIGHT, function=WINDOW),
    Scene("window, decode", 1, 6, LEFT, 5, function=WINDOW),
    Scene("window, sliding cache", 1, 3, LEFT, 5, 3, function=WINDOW, others=WHOLE),
    Scene("window, sliding cache, past", 2, 4, LEFT, 4, 2, function=WINDOW),
    Scene("bidirectional", 6, 6, BOTH, function=BIDIRECTIONAL),
    Scene("cross", 4, 6, RIGHT, function=BIDIRECTIONAL),
    Scene("holes", 6, 6, HOLES, lengths=False),
    Scene(
        "chunks",
        6,
        6,
        function=patterns.chunked_causal_mask_function(2, torch.tensor([0, 1])),
        lengths=False,
        others=WHOLE,
    ),
    Scene(
        "packed",
        6,
        6,
        function=patterns.and_masks(
            patterns.causal_mask_function,
            patterns.packed_sequence_mask_function(
                torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
            ),
        ),
        lengths=False,
        others=WHOLE,
    ),
]
KV_MAP = (0, 0, 0, 1, 2)


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_lengths_say_what_the_mask_says(
    scene: Scene, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    for name in ("ragged_attention", "ragged_decode"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, **k: used.append(op) or op(*a, **k))
    heads, kv_map = (5, KV_MAP) if ragged else (6, (0, 0, 1, 1, 2, 2))
    module = SimpleNamespace(is_causal=True, **({"kv_map": kv_map} if ragged else {}))
    query, key, value = (
        torch.randn(2, n, length, 4, dtype=torch.float64)
        for n, length in ((heads, scene.queries), (3, scene.keys), (3, scene.keys))
    )
    padding = None if scene.padding is None else torch.tensor(scene.padding).bool()
    mask = interlace_mask(
        batch_size=2,
        q_length=scene.queries,
        kv_length=scene.keys,
        q_offset=scene.offset,
        kv_offset=scene.kv_offset,
        mask_function=scene.function,
        attention_mask=padding,
        **{"allow_is_causal_skip": True, "allow_is_bidirectional_skip": False, **scene.others},
    )
    assert mask is not None
    assert mask.dtype == torch.bool
    assert (pattern_of(mask) is not None) == scene.lengths
    with ops.backend("torch"):
        out, weights = interlace_attention(module, query, key, value, mask)
    assert weights is None
    assert len(used) == scene.lengths
    truth = scaled_dot_product_attention(
        query, key[:, kv_map], value[:, kv_map], attn_mask=mask
    ).transpose(1, 2)
    # what stands at padding sees nothing by the mask, and is read by nobody
    real = mask[:, 0].any(-1)
    if padding is not None and scene.function is not BIDIRECTIONAL:
        position = torch.arange(scene.queries) + scene.offset
        real = real & padding[:, position]
    assert real.any()
    torch.testing.assert_close(out[real], truth[real], rtol=1e-12, atol=1e-12)
    out, weights = interlace_attention(module, query, key, value, mask, output_attentions=True)
    torch.testing.assert_close(out[real], truth[real], rtol=1e-12, atol=1e-12)
    assert weights is not None
    torch.testing.assert_close(
        (weights @ value[:, kv_map]).transpose(1, 2)[real], truth[real], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (4, 9)])
def test_without_a_mask_causality_is_the_modules(queries: int, keys: int, backend: str) -> None:
    query = torch.randn(2, 5, queries, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 3, keys, 4, dtype=torch.float64)
    for causal in (True, False):
        module = SimpleNamespace(is_causal=causal, kv_map=KV_MAP)
        with ops.backend(backend):
            out, _ = interlace_attention(module, query, key, value, None)
        # a cache that is longer than causal queries is empty behind them
        seen = queries if causal and queries > 1 else keys
        truth = scaled_dot_product_attention(
            query, key[:, KV_MAP, :seen], value[:, KV_MAP, :seen], is_causal=causal and queries > 1
        )
        torch.testing.assert_close(out, truth.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_masks_of_the_caller_and_wide_heads_go_to_torch() -> None:
    module = SimpleNamespace(is_causal=True)
    query, key, value = torch.randn(3, 2, 4, 6, 300, dtype=torch.float64)
    added = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with ops.backend("torch"):
        out, _ = interlace_attention(module, query, key, value, added)
        wide, _ = interlace_attention(module, query, key, value, None)
    truth = scaled_dot_product_attention(query, key, value, attn_mask=added).transpose(1, 2)
    torch.testing.assert_close(out, truth)
    truth = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(wide, truth)


def test_a_position_bias_is_left_to_transformers() -> None:
    module = SimpleNamespace(is_causal=False, num_key_value_groups=1)
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    bias = torch.randn(1, 4, 6, 6)
    out, _ = interlace_attention(module, query, key, value, None, position_bias=bias)
    truth = scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
    torch.testing.assert_close(out, truth)
    module.kv_map = (0, 1, 2, 3)
    interlace_attention(module, query, key, value, None, position_bias=bias)
    module.kv_map = (0, 1, 1, 2)
    with pytest.raises(BackendError, match="position bias"):
        interlace_attention(module, query, key[:, :3], value[:, :3], None, position_bias=bias)


def test_what_is_not_computed_is_refused() -> None:
    module = SimpleNamespace(is_causal=True)
    query, key, value = torch.randn(3, 1, 2, 3, 4)
    with pytest.raises(BackendError, match=r"softcap.*eager"):
        interlace_attention(module, query, key, value, None, softcap=30.0)


@pytest.mark.parametrize("kv_map", [(0, 1, 0), (0, 1), (0, 1, 3), None])
def test_head_maps_that_do_not_fit_are_refused(kv_map: Any) -> None:
    module = SimpleNamespace() if kv_map is None else SimpleNamespace(kv_map=kv_map)
    with pytest.raises(ShapeError, match="kv_map"):
        head_groups(module, 3, 2)
