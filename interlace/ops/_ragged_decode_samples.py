"""Arguments that ragged_decode is tested with; unused slots of the caches hold NaN.

Letters: B sequences, N new tokens, Hkv key-value heads, D head size, L capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interlace.ops._draw import Draw
from interlace.ops._registry import OpSample

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Form:
    """A problem in numbers, from which tensors are drawn.

    Attributes:
        name: what is special about it.
        q_start: prefix array of the query heads.
        width: D.
        capacity: L; a multiple of `block` where that is given.
        lengths: keys per sequence.
        tokens: N.
        starts: first keys; empty for None.
        block: keys per block of a paged cache; 0 for a contiguous one.
        window: keys that a token sees.
        gated: with a gate.
        scale: magnitude of queries and keys, and of values.
        strided: caches as [B, L, Hkv, D] in memory, queries cut from a longer row, lengths and
            starts from a table.
        broken: a NaN among the keys, an infinity among the values.
    """

    name: str
    q_start: tuple[int, ...]
    width: int
    capacity: int
    lengths: tuple[int, ...]
    tokens: int = 1
    starts: tuple[int, ...] = ()
    block: int = 0
    window: int | None = None
    gated: bool = False
    scale: tuple[float, float] = (1.0, 1.0)
    strided: bool = False
    broken: bool = False

    def draw(self, device: torch.device, dtype: torch.dtype) -> OpSample:
        """Draw the tensors."""
        draw = Draw(device, dtype)
        normal = draw.normal
        batch, heads, kv_heads = len(self.lengths), self.q_start[-1], len(self.q_start) - 1

        def whole(values: tuple[int, ...]) -> Tensor:
            made = torch.tensor(values, dtype=torch.int32, device=device)
            return torch.stack([made, made + 1], dim=1)[:, 0] if self.strided else made

        size, value_size = self.scale
        q = normal(batch, self.tokens, heads, self.width, scale=size)
        # in memory [B, L, Hkv, D]
        k = normal(batch, self.capacity, kv_heads, self.width, scale=size)
        v = normal(batch, self.capacity, kv_heads, self.width, scale=value_size)
        if self.broken:
            k[0, 1, 0, 2], v[-1, 0, -1, 3] = float("nan"), float("inf")
        for b, length in enumerate(self.lengths):
            for cache in (k, v):
                cache[b, length:] = float("nan")
                cache[b, : self.starts[b] if self.starts else 0] = float("nan")
        table = None
        if self.block:
            k, v, table = self._page(k, v, draw.generator)
            table = table.to(device)
        elif self.strided:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            q = normal(batch, self.tokens, heads, 3 * self.width, scale=size)[
                ..., self.width : 2 * self.width
            ]
        else:
            k, v = (cache.transpose(1, 2).contiguous() for cache in (k, v))
        gate: Tensor | None = None
        if self.gated:
            exact = torch.promote_types(dtype, torch.float32)
            gate = torch.rand(heads, generator=draw.generator).to(device, exact)
        return OpSample(
            self.name,
            (
                q,
                k,
                v,
                whole(self.lengths),
                whole(self.starts) if self.starts else None,
                table,
                list(self.q_start),
                self.window,
                self.width**-0.5,
                gate,
            ),
        )

    def _page(self, k: Tensor, v: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Scatter caches over blocks in random order, one block more than needed."""
        per_sequence = self.capacity // self.block
        used = len(self.lengths) * per_sequence
        order = torch.randperm(used + 1, generator=generator)[:used]
        table = order.int().view(len(self.lengths), per_sequence)
        pages = []
        for cache in (k, v):
            page = cache.new_full((used + 1, self.block, *cache.shape[2:]), float("nan"))
            page[order.to(cache.device)] = cache.reshape(used, self.block, *cache.shape[2:])
            pages.append(page)
        for b, length in enumerate(self.lengths):
            # entries beyond the keys of a sequence point nowhere
            table[b, -(-length // self.block) :] = -7
        return (*pages, table)


_RAGGED = (0, 3, 4, 4, 8)

_FORMS = (
    Form("odd", (0, 3, 4, 8), 40, 37, (37, 37)),
    Form("ragged", _RAGGED, 40, 37, (36, 20)),
    Form("large_groups", (0, 5, 6, 17), 40, 37, (36, 20)),
    Form("several_tokens", _RAGGED, 64, 70, (70, 31, 5), tokens=3),
    Form("fewer_keys_than_tokens", (0, 2, 3), 16, 9, (2, 9, 0, 4), tokens=4),
    Form("paged", _RAGGED, 32, 96, (90, 17, 0), block=16),
    Form("paged_odd", (0, 2, 3), 24, 45, (45, 11), tokens=2, block=5, starts=(7, 0), window=20),
    Form("left_padded", (0, 2, 4), 80, 50, (50, 41, 30), starts=(13, 0, 30), tokens=2),
    Form("window", (0, 1, 2), 48, 150, (150, 140, 3), tokens=3, window=9),
    Form("window_one", (0, 2), 16, 20, (20, 7), window=1),
    Form("gated", _RAGGED, 96, 33, (33, 12), gated=True),
    Form("one", (0, 1), 1, 1, (1,)),
    Form("no_key_and_one_key", (0, 2, 5), 128, 64, (0, 1)),
    Form("long", (0, 1, 5), 64, 1100, (1100, 700)),
    Form("long_ragged", _RAGGED, 72, 700, (650,), tokens=2, window=600, starts=(3,)),
    Form("room_to_grow", (0, 4), 128, 2000, (5,)),
    Form("strided", (0, 2, 3), 32, 40, (40, 22), tokens=2, starts=(3, 0), strided=True),
    Form("wide", (0, 2, 3), 256, 40, (40,)),
    Form("odd_width", (0, 2, 3), 33, 40, (40,), tokens=2),
    Form("many_heads", (0, 20, 21), 16, 30, (30, 9), tokens=2),
    Form("prompt", (0, 3, 4), 16, 60, (60, 44), tokens=44),
    Form("empty_heads", (0, 0, 2, 2), 16, 30, (30, 9)),
    Form("no_heads", (0, 0), 16, 8, (8,)),
    Form("no_sequence", _RAGGED, 16, 8, ()),
    Form("no_token", _RAGGED, 16, 8, (8,), tokens=0),
    Form("no_capacity", (0, 2), 16, 0, (0, 0)),
    Form("huge", (0, 3, 4), 64, 80, (80, 33), scale=(60.0, 6e3)),
    Form("tiny", (0, 3, 4), 64, 80, (80, 33), scale=(1e-4, 1e-3)),
    Form("not_finite", (0, 3, 4), 16, 40, (40, 33), broken=True),
)


def samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """Ragged maps, masks, pages, strides, nothing, one of each, magnitudes."""
    return [form.draw(device, dtype) for form in _FORMS]
