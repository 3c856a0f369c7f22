"""ragged_decode in the language model: one new token, uniform and ragged head maps.

Letters: B sequences, N new tokens, Hq query heads, Hkv key-value heads, D head size, L keys.

All sequences fill their caches, so that the baselines need no mask: it would only slow them down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from interlace.microbenchmarks.case import Case, Setup, compiled
from interlace.microbenchmarks.heads import kv_heads, prefix, ragged, uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from interlace.microbenchmarks.shapes import ModelShape, Tower

PAGE = 16
# bytes of keys and values: beyond the first no case is made, beyond the second only the kernels and
# what works on the cache as it is run
_LARGEST, _LARGEST_COPIED = 9 << 30, 3 << 30


def cases(shape: ModelShape, setup: Setup) -> Iterator[Case]:
    """Yield batches and lengths, each with the model's own head map and with a ragged one."""
    tower = shape.text
    for batch, num_keys in _sizes(shape, setup):
        for name, groups in (("uniform", uniform(tower)), ("ragged", ragged(tower))):
            size = setup.dtype.itemsize * 2 * batch * num_keys * len(groups) * tower.head_dim
            if size <= _LARGEST:
                yield _case(f"{name}-b{batch}-k{num_keys}", tower, setup, groups, batch, num_keys)
    if setup.is_cuda and not setup.quick:
        yield _several_tokens("ragged-b8-k8192-n4", tower, setup, batch=8, num_keys=8192, tokens=4)
        yield _paged("paged-b32-k4096", tower, setup, batch=32, num_keys=4096)


def _sizes(shape: ModelShape, setup: Setup) -> tuple[tuple[int, int], ...]:
    if shape.name == "tiny":
        return ((2, 64),)
    if setup.is_cuda:
        few = ((32, 4096), (1, 1024))
        return few if setup.quick else (*few, (1, 65536), (8, 8192), (1, 8192), (32, 16384))
    return ((1, 1024),) if setup.quick else ((1, 4096), (4, 1024), (1, 16384))


def _case(
    name: str, tower: Tower, setup: Setup, groups: list[int], batch: int, num_keys: int
) -> Case:
    q = setup.randn(batch, 1, sum(groups), tower.head_dim)
    k = setup.randn(batch, len(groups), num_keys, tower.head_dim)
    v = setup.randn(batch, len(groups), num_keys, tower.head_dim)
    copied = k.nbytes + v.nbytes <= _LARGEST_COPIED
    return Case(
        name,
        args=(*_arguments(setup, q, k, v, num_keys), None, prefix(groups), None, _scale(q), None),
        baselines=_baselines(setup, q, k, v, groups, copied=copied),
        left_out={} if copied else {"torch": "the reference copies the cache to fp32"},
    )


def _baselines(
    setup: Setup, q: Tensor, k: Tensor, v: Tensor, groups: list[int], *, copied: bool
) -> dict[str, Callable[[], object] | str]:
    heads = kv_heads(setup, groups)
    rows = q.transpose(1, 2)
    made: dict[str, Callable[[], object] | str] = {}
    too_large = "copies of the cache would not fit"
    if copied:
        gathered = k[:, heads], v[:, heads]
        made["gather + SDPA"] = lambda: attend(rows, k[:, heads], v[:, heads])
        made["SDPA, heads gathered beforehand"] = lambda: attend(rows, *gathered)
    else:
        made["gather + SDPA"] = made["SDPA, heads gathered beforehand"] = too_large
    if len(set(groups)) == 1:
        made["SDPA, enable_gqa"] = lambda: attend(rows, k, v, enable_gqa=True)
        made["FlexAttention, compiled"] = compiled(flex, rows, k, v)
    else:
        refusal = "wants the same number of query heads for every kv head"
        made["SDPA, enable_gqa"] = made["FlexAttention, compiled"] = refusal
    return made


def _several_tokens(
    name: str, tower: Tower, setup: Setup, *, batch: int, num_keys: int, tokens: int
) -> Case:
    groups = ragged(tower)
    q = setup.randn(batch, tokens, sum(groups), tower.head_dim)
    k = setup.randn(batch, len(groups), num_keys, tower.head_dim)
    v = setup.randn(batch, len(groups), num_keys, tower.head_dim)
    heads, rows = kv_heads(setup, groups), q.transpose(1, 2)
    mask = torch.ones(tokens, num_keys, dtype=torch.bool, device=setup.device)
    mask = mask.tril(num_keys - tokens)
    return Case(
        name,
        args=(*_arguments(setup, q, k, v, num_keys), None, prefix(groups), None, _scale(q), None),
        baselines={
            "gather + SDPA": lambda: attend(rows, k[:, heads], v[:, heads], attn_mask=mask),
        },
    )


def _paged(name: str, tower: Tower, setup: Setup, *, batch: int, num_keys: int) -> Case:
    groups = uniform(tower)
    num_pages = batch * num_keys // PAGE
    q = setup.randn(batch, 1, sum(groups), tower.head_dim)
    k = setup.randn(num_pages, PAGE, len(groups), tower.head_dim)
    v = setup.randn(num_pages, PAGE, len(groups), tower.head_dim)
    order = torch.randperm(num_pages, generator=setup.generator, device=setup.device)
    table = order.int().view(batch, -1)
    rows = q.transpose(1, 2)

    def gather(cache: Tensor) -> Tensor:
        return cache[table].flatten(1, 2).transpose(1, 2)

    return Case(
        name,
        args=(*_arguments(setup, q, k, v, num_keys), table, prefix(groups), None, _scale(q), None),
        baselines={
            "gather pages + SDPA, enable_gqa": lambda: attend(
                rows, gather(k), gather(v), enable_gqa=True
            )
        },
    )


def _arguments(
    setup: Setup, q: Tensor, k: Tensor, v: Tensor, num_keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    return q, k, v, setup.whole([num_keys] * len(q)), None


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def attend(rows: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """PyTorch's attention, in the op's layout."""
    return scaled_dot_product_attention(rows, k, v, **options).transpose(1, 2)


def flex(rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention without a mask, in the op's layout."""
    return flex_attention(rows, k, v, enable_gqa=True).transpose(1, 2)
