"""silu_mul between the projections of a feed-forward part, for prompts and for steps of decoding.

Letters: T tokens, F width of the feed-forward part.

Gate and up are halves of a merged projection, as in a fused model; the baselines read the same. One
more case has them apart, each without gaps, as two projections leave them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as functional

from interlace.microbenchmarks.case import Case, Setup, compiled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from interlace.microbenchmarks.shapes import ModelShape


def cases(shape: ModelShape, setup: Setup) -> Iterator[Case]:
    """Yield prompts with their backward, decoding, and projections that are not merged."""
    # of these models, those with RMSNorm have the gate
    if shape.text.norm != "rms":
        return
    width = shape.text.intermediate
    tokens = _tokens(shape, setup)
    for num_tokens in tokens:
        gate, up = setup.randn(num_tokens, 2 * width).chunk(2, dim=-1)
        yield _case(f"f{width}-t{num_tokens}", gate, up)
    if not setup.quick:
        gate, up = (setup.randn(tokens[0], width) for _ in range(2))
        yield _case(f"f{width}-apart-t{tokens[0]}", gate, up)


def _tokens(shape: ModelShape, setup: Setup) -> tuple[int, ...]:
    if shape.name == "tiny":
        return (64, 1)
    if setup.is_cuda:
        return (4096, 1) if setup.quick else (4096, 16384, 1, 32)
    return (64, 1) if setup.quick else (256, 1)


def _case(name: str, gate: Tensor, up: Tensor) -> Case:
    return Case(
        name,
        args=(gate, up),
        baselines={
            "F.silu, product": lambda: activation(gate, up),
            "torch.compile of F.silu, product": compiled(activation, gate, up),
        },
        # below, a step is all overhead, and nobody trains with it
        backward=len(gate) >= 64,
    )


def activation(gate: Tensor, up: Tensor) -> Tensor:
    """What feed-forward parts of transformers compute between their projections."""
    return functional.silu(gate) * up
