"""qk_norm_rope on the heads of a layer, for prompts and for one step of decoding.

Letters: T tokens, H heads, D head size, F frequencies.

The baseline is the preamble of an attention layer as transformers writes it: norms in fp32 that are
rounded, then the rotation with tables made beforehand, in the dtype of the heads for text and in
fp32 for images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from interlace.microbenchmarks.case import Case, Setup, compiled
from interlace.ops import rope_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from interlace.microbenchmarks.shapes import ModelShape, Tower

EPS = 1e-6


def cases(shape: ModelShape, setup: Setup) -> Iterator[Case]:
    """Yield prompts with their backward, decoding, unmerged axes, and the image encoder."""
    tower = shape.text
    if tower.rope_theta is not None:
        for num_tokens in _tokens(shape, setup):
            # below, a step is all overhead, and nobody trains with it
            prompt = num_tokens >= 64
            yield _case(f"text-t{num_tokens}", tower, num_tokens, setup, backward=prompt)
        if tower.mrope_section and not setup.quick:
            num_tokens = _tokens(shape, setup)[0]
            yield _case(f"text-axes-t{num_tokens}", tower, num_tokens, setup, merge=False)
    if shape.vision.rope_theta is not None and not setup.quick:
        num_tokens = _tokens(shape, setup)[0]
        yield _case(f"vision-t{num_tokens}", shape.vision, num_tokens, setup)


def _tokens(shape: ModelShape, setup: Setup) -> tuple[int, ...]:
    if shape.name == "tiny":
        return (64, 1)
    if setup.is_cuda:
        return (4096, 1) if setup.quick else (4096, 16384, 1, 32)
    return (64,) if setup.quick else (256, 1)


def _case(
    name: str,
    tower: Tower,
    num_tokens: int,
    setup: Setup,
    *,
    merge: bool = True,
    backward: bool = False,
) -> Case:
    q = setup.randn(num_tokens, tower.query_heads, tower.head_dim)
    k = setup.randn(num_tokens, tower.kv_heads, tower.head_dim)
    q_weight, k_weight = (
        1 + 0.1 * setup.randn(tower.head_dim) if tower.qk_norm else None for _ in "qk"
    )
    half = tower.head_dim // 2
    inv_freq = tower.rope_theta ** -(torch.arange(half, device=setup.device) / half)
    sections = list(tower.mrope_section) or None
    lead = (3,) if sections else ()
    positions = torch.arange(num_tokens, device=setup.device).expand(*lead, -1)
    merged = rope_tables(positions, inv_freq, sections=sections)
    tables = merged if merge else rope_tables(positions, inv_freq)
    dtype = setup.dtype if tower.causal else torch.float32
    doubled = [torch.cat((each, each), dim=-1).to(dtype) for each in merged]
    given = (q, k, *doubled, q_weight, k_weight)
    made: dict[str, Callable[[], object] | str] = {
        "transformers": lambda: preamble(*given),
        "torch.compile of transformers": compiled(preamble, *given),
    }
    return Case(
        name,
        args=(q, k, *tables, q_weight, k_weight, EPS, None if merge else sections, True),
        baselines=made,
        backward=backward,
    )


def preamble(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Norm and rotate heads [T, H, D] with doubled tables [T, 2F]."""
    q, k = (
        _rotated(x if weight is None else _normed(x, weight), cos, sin)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q, k


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    exact = x.float()
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)
