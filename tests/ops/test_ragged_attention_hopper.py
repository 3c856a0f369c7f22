"""Tiles by TMA, as on Hopper, in triton's interpreter: what is copied, and sequences of nothing."""

from __future__ import annotations

import os
from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton")

from interlace.ops._check import in_fp64, outputs
from interlace.ops._ragged_reference import backward_reference, reference
from interlace.ops._registry import OPS
from interlace.triton_kernels import _ragged, ragged_attention, ragged_attention_bwd

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is present; the gpu lane runs these"
)


def heads(tokens: int, count: int, head_dim: int, kind: str) -> torch.Tensor:
    if kind == "misaligned":
        return torch.randn(tokens, count, head_dim + 3)[..., 1:-2].half()
    if kind == "heads first":
        return torch.randn(count, tokens, head_dim).half().transpose(0, 1)
    return torch.randn(tokens, count, head_dim).half()


@pytest.mark.parametrize("head_dim", [20, 24, 40])
@pytest.mark.parametrize("kind", ["plain", "misaligned", "heads first"])
def test_any_heads_can_be_fetched(
    kind: str, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_ragged, ragged_attention, ragged_attention_bwd):
        monkeypatch.setattr(module, "on_hopper", lambda tensor: True)
        # what comes by TMA is not upcast; the interpreter's fp16 does not need it
        monkeypatch.setattr(module, "interpreted", lambda: False)
    lengths = [(0, 2), (33, 40), (1, 0), (5, 5), (0, 0)]
    prefixes = [
        torch.tensor([0, *accumulate(each)], dtype=torch.int32)
        for each in zip(*lengths, strict=True)
    ]
    q, k, v = heads(39, 3, head_dim, kind), heads(47, 2, head_dim, kind), heads(47, 2, head_dim, "")
    for wide, each in zip(_ragged.fetchable(q, k, v), (q, k, v), strict=True):
        assert _ragged.fits_tma(wide)
        assert torch.equal(wide[..., :head_dim], each)
        assert not wide[..., head_dim:].any()
    gate = torch.randn(3)
    args = (q, k, v, gate, *prefixes, [0, 1, 3], 33, 40, True, None, head_dim**-0.5)
    assert ragged_attention.launch_for(*_ragged.fetchable(q, k, v)).tma
    plain, truth = reference(*args), reference(*in_fp64(args))
    found = ragged_attention.forward(*args)
    backward = (torch.randn_like(plain[0]), *plain, *args)
    pairs = [("ragged_attention", found, plain, truth)]
    pairs.append(
        (
            "ragged_attention_bwd",
            ragged_attention_bwd.backward(*backward),
            backward_reference(*backward),
            backward_reference(*in_fp64(backward)),
        )
    )
    for name, *results in pairs:
        for each in zip(*map(outputs, results), strict=True):
            assert OPS[name].budget.excess(*each) is None
