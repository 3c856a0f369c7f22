"""layer_similarity on all hidden states of a model, every pair or a band of three.

Letters: S states, T tokens, D hidden size.

One group holds all tokens: more groups cost the op nothing and make every baseline slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional

from interlace.microbenchmarks.case import Case, Setup, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from interlace.microbenchmarks.shapes import ModelShape

BAND = 3
_CHUNK = 1024


def cases(shape: ModelShape, setup: Setup) -> Iterator[Case]:
    """Yield every pair and the band, for growing numbers of tokens."""
    tower = shape.main
    for num_tokens in _tokens(shape, setup):
        # stacked, as no model hands them over: the op takes the states one by one, and the
        # baselines are spared the stacking
        states = setup.randn(tower.layers + 1, num_tokens, tower.hidden)
        groups = torch.zeros(num_tokens, dtype=torch.int32, device=setup.device)
        for name, reach in (("full", None), (f"band{BAND}", BAND)):
            yield Case(
                f"{name}-t{num_tokens}",
                args=(list(states.unbind(0)), groups, 1, reach),
                baselines=_baselines(states, reach),
            )


def _tokens(shape: ModelShape, setup: Setup) -> tuple[int, ...]:
    if shape.name == "tiny":
        return (64,)
    if setup.is_cuda:
        return (4096,) if setup.quick else (4096, 16384, 2048, 8192)
    return (64,) if setup.quick else (256,)


def _baselines(states: Tensor, reach: int | None) -> dict[str, Callable[[], object] | str]:
    num_states, num_tokens, _ = states.shape
    reach = num_states - 1 if reach is None else reach
    pairs = [(i, j) for j in range(num_states) for i in range(max(0, j - reach), j)]
    rows = torch.tensor([i for i, _ in pairs], device=states.device)
    columns = torch.tensor([j for _, j in pairs], device=states.device)

    def per_pair() -> tuple[Tensor]:
        found = [functional.cosine_similarity(states[i], states[j], dim=-1) for i, j in pairs]
        # the cosine of a state with itself needs no computing
        sums = states.new_zeros(num_states, num_states, dtype=torch.float32).fill_diagonal_(
            num_tokens
        )
        sums[rows, columns] = sums[columns, rows] = torch.stack(found).float().sum(1)
        return (sums[None],)

    # what a band leaves out is set to 0, in one small product
    whole = states.new_ones(num_states, num_states, dtype=torch.float32)
    band = whole.tril(reach).triu(-reach)
    made: dict[str, Callable[[], object] | str] = {
        "F.cosine_similarity per pair": per_pair,
        "normalise, one matmul": lambda: one_matmul(states, band),
        "normalise, batched matmul": lambda: batched_matmul(states, band),
        "chunked gram": lambda: chunked_gram(states, band),
        "torch.compile of one matmul": compiled(one_matmul, states, band),
    }
    if num_tokens <= _CHUNK:
        # one chunk; more are unrolled, and take minutes to compile
        made["torch.compile of chunked gram"] = compiled(chunked_gram, states, band)
    if reach < num_states - 1:
        made["normalise, product per offset"] = lambda: per_offset(states, reach)
        made["torch.compile of product per offset"] = compiled(per_offset, states, reach)
    return made


def one_matmul(states: Tensor, band: Tensor) -> tuple[Tensor]:
    """All tokens as one long inner dimension: the sum over tokens comes with the product."""
    rows = functional.normalize(states, dim=-1).flatten(1)
    return (((rows @ rows.T).float() * band)[None],)


def batched_matmul(states: Tensor, band: Tensor) -> tuple[Tensor]:
    """A Gram matrix of normalised states per token, then the sum over tokens."""
    rows = functional.normalize(states, dim=-1).transpose(0, 1)
    return (torch.bmm(rows, rows.mT).float().sum(0, keepdim=True) * band,)


def chunked_gram(states: Tensor, band: Tensor, chunk: int = _CHUNK) -> tuple[Tensor]:
    """Gram matrices of the states as they are, by chunks of tokens; the diagonal has the norms."""
    sums = states.new_zeros(len(states), len(states), dtype=torch.float32)
    for part in states.split(chunk, dim=1):
        rows = part.transpose(0, 1)
        gram = torch.bmm(rows, rows.mT).float()
        scale = gram.diagonal(dim1=1, dim2=2).rsqrt()
        sums += (gram * scale[:, :, None] * scale[:, None, :]).sum(0)
    return ((sums * band)[None],)


def per_offset(states: Tensor, reach: int) -> tuple[Tensor]:
    """Products of normalised states that lie 0..reach apart."""
    rows = functional.normalize(states, dim=-1)
    sums = states.new_zeros(len(states), len(states), dtype=torch.float32)
    for offset in range(reach + 1):
        products = (rows[: len(rows) - offset] * rows[offset:]).sum((1, 2), dtype=torch.float32)
        sums = sums + products.diag_embed(offset)
        if offset:
            sums = sums + products.diag_embed(-offset)
    return (sums[None],)
