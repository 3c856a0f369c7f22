"""ragged_attention on prompts: causal in the language model, full in the vision tower.

Letters: T tokens of one sequence, Hq query heads, Hkv key-value heads, D head size.

One sequence fills the batch, so that the baselines need no mask: it would only slow them down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from interlace.microbenchmarks.case import Case, Setup, compiled
from interlace.microbenchmarks.heads import kv_heads, prefix, ragged, uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from interlace.microbenchmarks.shapes import ModelShape, Tower

_SDPA = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
}
# tokens: beyond this, whatever writes all scores out is left out
_MOST_WRITTEN_OUT = 8192
_TOO_LARGE = "writing all scores out would not fit"
_UNEVEN = "wants the same number of query heads for every kv head"


def cases(shape: ModelShape, setup: Setup) -> Iterator[Case]:
    """Yield growing prompts, each with the model's own head map and with a ragged one."""
    tower = shape.text
    for tokens in _tokens(shape, setup):
        for name, groups in (("uniform", uniform(tower)), ("ragged", ragged(tower))):
            yield _case(f"{name}-t{tokens}", tower, setup, groups, tokens)
    vision = shape.vision
    if not setup.quick and vision.tokens is not None:
        yield _case(f"vision-t{vision.tokens}", vision, setup, uniform(vision), vision.tokens)


def _tokens(shape: ModelShape, setup: Setup) -> tuple[int, ...]:
    if shape.name == "tiny":
        return (48,)
    if setup.is_cuda:
        return (4096,) if setup.quick else (4096, 16384, 8192)
    return (128,) if setup.quick else (128, 512)


def _case(name: str, tower: Tower, setup: Setup, groups: list[int], tokens: int) -> Case:
    q = setup.randn(tokens, sum(groups), tower.head_dim)
    k = setup.randn(tokens, len(groups), tower.head_dim)
    v = setup.randn(tokens, len(groups), tower.head_dim)
    bounds = setup.whole([0, tokens])
    written_out = tokens <= _MOST_WRITTEN_OUT
    scale = tower.head_dim**-0.5
    return Case(
        name,
        args=(
            *(q, k, v, None, bounds, bounds, prefix(groups)),
            *(tokens, tokens, tower.causal, None, scale),
        ),
        baselines=_baselines(setup, tower, groups, q, k, v, written_out=written_out),
        backward=True,
        left_out={} if written_out else {"torch": _TOO_LARGE},
    )


def _baselines(
    setup: Setup,
    tower: Tower,
    groups: list[int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    written_out: bool,
) -> dict[str, Callable[[], object] | str]:
    even = len(set(groups)) == 1
    heads = kv_heads(setup, groups)

    def keys(tensor: Tensor) -> Tensor:
        # repeated as attention over a ragged map has to, where SDPA cannot share them itself
        return tensor if even else tensor[:, heads]

    def attend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, keys(k), keys(v), tower.causal, enable_gqa=even)

    made: dict[str, Callable[[], object] | str] = {}
    gather = "" if even else "gather + "
    for name, backend in _SDPA.items():
        if not setup.is_cuda and backend in (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ):
            made[gather + name] = "is there on GPUs only"
        elif backend is SDPBackend.MATH and not written_out:
            made[gather + name] = _TOO_LARGE
        elif even and tower.kv_heads < tower.query_heads and "efficient" in name:
            made[name] = "does not share a kv head among query heads"
        else:
            made[gather + name] = lambda backend=backend: attend(backend)
    if not even:
        made["FlexAttention, compiled"] = _UNEVEN
    elif not setup.is_cuda:
        made["FlexAttention, compiled"] = "has no gradient on the CPU"
    else:
        tokens = len(q)
        block = (
            create_block_mask(_looks_back, None, None, tokens, tokens, device=setup.device)
            if tower.causal
            else None
        )
        made["FlexAttention, compiled"] = compiled(flex, q, k, v, block)
    return made


def _looks_back(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, **options: bool) -> Tensor:
    """PyTorch's attention on one packed sequence, in the op's layout."""
    rows, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = scaled_dot_product_attention(rows, keys, values, is_causal=causal, **options)
    return found[0].transpose(0, 1)


def flex(q: Tensor, k: Tensor, v: Tensor, block: object) -> Tensor:
    """FlexAttention on one packed sequence, in the op's layout."""
    rows, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = flex_attention(rows, keys, values, block_mask=block, enable_gqa=True)
    return found[0].transpose(0, 1)
