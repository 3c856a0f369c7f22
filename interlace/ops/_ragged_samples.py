"""Arguments that ragged_attention and its backward are tested, compiled and timed with."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from interlace.ops._draw import Draw
from interlace.ops._ragged_reference import reference
from interlace.ops._registry import OpSample


def samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """Ragged groups, windows, lengths that differ, nothing, one of each, strides, magnitudes."""
    made = _Maker(device, dtype)
    return [
        made.sample("ragged", (9, 14), (9, 14), (1, 3, 0, 2), 24, gate=True),
        made.sample("least", (3,), (5,), (2, 1), 4, gate=True),
        made.sample("blocks", (150, 201), (150, 201), (3, 1), 64),
        made.sample("uniform", (70,), (70,), (2, 2), 80),
        made.sample("full", (33, 17), (33, 17), (1, 2), 96, causal=False, gate=True),
        made.sample("cross", (5, 1, 40), (19, 3, 150), (3,), 32, causal=False),
        made.sample("prefill", (7, 31), (64, 150), (1, 5), 128),
        made.sample("window", (190,), (190,), (2,), 16, window=37, gate=True),
        made.sample("two_sided_window", (140, 30), (140, 33), (1, 1), 16, causal=False, window=21),
        made.sample("narrow_window", (6,), (6,), (1,), 8, window=2),
        made.sample("lengths", (0, 1, 7, 0, 2), (3, 1, 0, 0, 5), (1, 1), 16),
        made.sample("sees_nothing", (12, 3), (4, 1), (2,), 16),
        made.sample("sees_nothing_in_window", (9,), (2,), (1,), 16, causal=False, window=3),
        made.sample("no_token", (0, 0), (0, 0), (1, 1), 16),
        made.sample("no_sequence", (), (), (1, 2), 16),
        made.sample("no_query_head", (4,), (4,), (0, 0), 16),
        made.sample("no_head", (4,), (4,), (), 16),
        made.sample("one", (1,), (1,), (1,), 1),
        made.sample("wide", (20,), (20,), (1, 1), 200),
        made.sample("widest", (18,), (18,), (2,), 256),
        made.sample("odd_width", (20,), (20,), (1, 2), 72, scale=0.3),
        made.strided("strided", (21, 13), (21, 13), (2, 1), 40),
        made.sample("gate_of_zero", (8,), (8,), (1, 1), 16, gate=0.0),
        made.sample("huge", (40,), (40,), (1, 2), 32, size=12.0),
        made.sample("tiny", (40,), (40,), (1, 2), 32, size=1e-3),
    ]


def not_finite(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """A query with NaN, and a sequence whose keys and values all are NaN."""
    sample = _Maker(device, dtype).sample("not_finite", (9, 12), (9, 12), (1, 2), 16, causal=False)
    q, k, v = sample.args[:3]
    q[3, 1] = k[9:] = v[9:] = float("nan")
    return [sample]


def backward_samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """The same, with what the forward op gave and a gradient of its output."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for sample in samples(device, dtype):
        out, lse = reference(*sample.args)
        # not packed, as the rows of a matrix product's gradient may come
        grad = torch.randn(*out.shape[:2], out.shape[2] + 8, generator=generator)
        grad = grad.to(device, dtype)[..., : out.shape[2]]
        # along the output, so that the gradient of a gate is no sum of numbers that cancel
        grad += 4 * out
        found.append(OpSample(sample.name, (grad, out, lse, *sample.args)))
    return found


class _Maker(Draw):
    def sample(
        self,
        name: str,
        lengths_q: tuple[int, ...],
        lengths_kv: tuple[int, ...],
        groups: tuple[int, ...],
        head_dim: int,
        *,
        causal: bool = True,
        window: int | None = None,
        gate: bool | float = False,
        scale: float | None = None,
        size: float = 1.0,
    ) -> OpSample:
        q = self.normal(sum(lengths_q), sum(groups), head_dim) * size
        k, v = (self.normal(sum(lengths_kv), len(groups), head_dim) * size for _ in range(2))
        exact = torch.promote_types(self.dtype, torch.float32)
        gates = None
        if gate is not False:
            gates = self.normal(sum(groups)).to(exact) * (1.0 if gate is True else gate)
        args = (
            *(q, k, v, gates, self.prefix(lengths_q), self.prefix(lengths_kv)),
            *([0, *accumulate(groups)], max(lengths_q, default=0), max(lengths_kv, default=0)),
            *(causal, window, head_dim**-0.5 if scale is None else scale),
        )
        return OpSample(name, args)

    def strided(
        self,
        name: str,
        lengths_q: tuple[int, ...],
        lengths_kv: tuple[int, ...],
        groups: tuple[int, ...],
        head_dim: int,
    ) -> OpSample:
        # q, k and v in one buffer, as a fused projection leaves them; keys head by head; gates in a
        # column, and every other bound of a longer list
        plain = self.sample(name, lengths_q, lengths_kv, groups, head_dim)
        num_heads, num_kv = sum(groups), len(groups)
        buffer = self.normal(sum(lengths_q), num_heads + 2 * num_kv, head_dim + 3)[..., 1:-2]
        q, v = buffer[:, :num_heads], buffer[:, -num_kv:]
        k = self.normal(num_kv, sum(lengths_kv), head_dim).transpose(0, 1)
        exact = torch.promote_types(self.dtype, torch.float32)
        gates = self.normal(num_heads, 2).to(exact)[:, 0]
        bounds = (torch.stack((each, each + 1), dim=1)[:, 0] for each in plain.args[4:6])
        return OpSample(name, (q, k, v, gates, *bounds, *plain.args[6:]))

    def prefix(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)
