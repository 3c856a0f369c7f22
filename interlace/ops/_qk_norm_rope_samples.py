"""What qk_norm_rope is tested with.

Letters: B batch, T tokens, H heads, D head size, F frequencies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interlace.ops._draw import Draw
from interlace.ops._registry import OpSample
from interlace.ops._rope import rope_tables

_THETA = 1e4


class _Draw(Draw):
    """Draws heads, norm weights and tables."""

    def weight(self, width: int) -> Tensor:
        return self.cast(1 + 0.3 * torch.randn(width, generator=self.generator))

    def tables(self, *size: int) -> tuple[Tensor, Tensor]:
        """Tables [..., F] of random positions, fp32, or fp64 beside fp64 inputs."""
        *tokens, half = size
        positions = torch.randint(0, 4000, tokens, generator=self.generator)
        inv_freq = _THETA ** -(torch.arange(half) / half)
        dtype = torch.promote_types(self.dtype, torch.float32)
        cos, sin = (each.to(self.device, dtype) for each in rope_tables(positions, inv_freq))
        return cos, sin

    def plain(
        self, tokens: int, q_heads: int, k_heads: int, width: int, half: int, scale: float = 1.0
    ) -> tuple[Any, ...]:
        """Arguments with both norms and one axis."""
        return (
            self.normal(tokens, q_heads, width, scale=scale),
            self.normal(tokens, k_heads, width, scale=scale),
            *self.tables(tokens, half),
            self.weight(width),
            self.weight(width),
            1e-6,
            None,
            True,
        )


_NAMES = ("q", "k", "cos", "sin", "q_weight", "k_weight", "eps", "sections", "interleaved")


def _unlike(args: tuple[Any, ...], **changes: Any) -> tuple[Any, ...]:
    """The same arguments but for some."""
    return tuple(changes.get(name, arg) for name, arg in zip(_NAMES, args, strict=True))


def samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """Head sizes of models and odd ones, axes, layouts, missing norms, magnitudes, NaN, nothing."""
    draw = _Draw(device, dtype)
    found = [
        OpSample("plain", draw.plain(7, 3, 2, 16, 8)),
        OpSample("head_64", draw.plain(5, 4, 1, 64, 32)),
        OpSample("head_72", draw.plain(3, 2, 2, 72, 36)),
        OpSample("head_80", draw.plain(3, 5, 1, 80, 40)),
        OpSample("head_96", draw.plain(3, 3, 1, 96, 48)),
        OpSample("head_128", draw.plain(9, 6, 2, 128, 64)),
        OpSample("odd_half", draw.plain(5, 3, 1, 34, 17)),
        OpSample("partial", draw.plain(5, 3, 2, 80, 16)),
        OpSample("odd_rest", draw.plain(3, 2, 1, 11, 3)),
        OpSample("many_heads", draw.plain(3, 67, 1, 16, 8)),
        OpSample("many_tokens", draw.plain(150, 1, 1, 10, 5)),
        OpSample("one", draw.plain(1, 1, 1, 2, 1)),
        OpSample("no_token", draw.plain(0, 3, 2, 16, 8)),
        OpSample("no_key_head", draw.plain(3, 2, 0, 8, 4)),
        OpSample("huge", draw.plain(4, 3, 2, 32, 16, scale=5e3)),
        OpSample("tiny", draw.plain(4, 3, 2, 32, 16, scale=1e-6)),
    ]
    for name, make in _SPECIAL.items():
        found.append(OpSample(name, make(draw)))
    return found


def _interleaved(draw: _Draw) -> tuple[Any, ...]:
    cos, sin = draw.tables(3, 6, 16)
    return _unlike(draw.plain(6, 3, 2, 32, 16), cos=cos, sin=sin, sections=[6, 5, 5])


def _chunked(draw: _Draw) -> tuple[Any, ...]:
    cos, sin = draw.tables(3, 6, 16)
    args = draw.plain(6, 3, 2, 32, 16)
    return _unlike(args, cos=cos, sin=sin, sections=[4, 7, 5], interleaved=False)


def _merged_qkv(draw: _Draw) -> tuple[Any, ...]:
    merged = draw.normal(6, 3 + 2 + 2, 64)
    return _unlike(draw.plain(6, 3, 2, 64, 32), q=merged[:, :3], k=merged[:, 3:5])


def _heads_first(draw: _Draw) -> tuple[Any, ...]:
    q, k = (draw.normal(2, heads, 5, 24).transpose(1, 2) for heads in (3, 2))
    cos, sin = draw.tables(3, 2, 5, 12)
    args = draw.plain(5, 3, 2, 24, 12)
    return _unlike(args, q=q, k=k, cos=cos, sin=sin, sections=[4, 4, 4])


def _shared_tables(draw: _Draw) -> tuple[Any, ...]:
    q, k = (draw.normal(3, 5, heads, 24) for heads in (2, 1))
    return _unlike(draw.plain(5, 2, 1, 24, 12), q=q, k=k)


def _doubled_tables(draw: _Draw) -> tuple[Any, ...]:
    # as transformers hands them over: every number twice, in the dtype of the model, a batch of one
    doubled = [each.to(draw.dtype).repeat(1, 1, 2) for each in draw.tables(1, 5, 8)]
    q, k = (draw.normal(2, 5, heads, 16) for heads in (2, 1))
    cos, sin = (each[..., :8] for each in doubled)
    return _unlike(draw.plain(5, 2, 1, 16, 8), q=q, k=k, cos=cos, sin=sin)


def _no_norm(draw: _Draw) -> tuple[Any, ...]:
    return _unlike(draw.plain(6, 3, 2, 64, 24), q_weight=None, k_weight=None)


def _query_norm_only(draw: _Draw) -> tuple[Any, ...]:
    return _unlike(draw.plain(4, 3, 2, 16, 8), k_weight=None)


def _key_norm_only(draw: _Draw) -> tuple[Any, ...]:
    # with a weight kept in more precision than the heads
    weight = draw.weight(16).to(torch.promote_types(draw.dtype, torch.float32))
    return _unlike(draw.plain(4, 3, 2, 16, 8), q_weight=None, k_weight=weight)


def _scattered(draw: _Draw) -> tuple[Any, ...]:
    # elements of a head apart, and every query head the same memory
    q, k = draw.normal(4, 1, 12).expand(4, 3, 12), draw.normal(12, 4, 2).permute(1, 2, 0)
    return _unlike(draw.plain(4, 3, 2, 12, 6), q=q, k=k)


def _no_eps(draw: _Draw) -> tuple[Any, ...]:
    return _unlike(draw.plain(5, 3, 2, 12, 5), eps=0.0)


def _not_finite(draw: _Draw) -> tuple[Any, ...]:
    args = draw.plain(4, 3, 2, 16, 8)
    args[0][1, 2, 5] = float("nan")
    args[0][3, 0, 15] = float("inf")
    args[1][2, 1, 0] = float("-inf")
    return args


_SPECIAL: dict[str, Callable[[_Draw], tuple[Any, ...]]] = {
    "interleaved": _interleaved,
    "chunked": _chunked,
    "merged_qkv": _merged_qkv,
    "heads_first": _heads_first,
    "shared_tables": _shared_tables,
    "doubled_tables": _doubled_tables,
    "no_norm": _no_norm,
    "query_norm_only": _query_norm_only,
    "key_norm_only": _key_norm_only,
    "scattered": _scattered,
    "no_eps": _no_eps,
    "not_finite": _not_finite,
}


def backward_samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """The samples of the forward op behind gradients of its outputs."""
    draw = _Draw(device, dtype)
    found = [
        OpSample(each.name, (*(draw.normal(*x.shape) for x in each.args[:2]), *each.args))
        for each in samples(device, dtype)
    ]
    name, (dq_out, dk_out, *others) = found[0].name, found[0].args
    spread = draw.normal(1).expand(dq_out.shape)
    turned = draw.normal(*dk_out.shape[::-1]).permute(2, 1, 0)
    return [*found, OpSample(f"{name}_scattered_gradients", (spread, turned, *others))]
