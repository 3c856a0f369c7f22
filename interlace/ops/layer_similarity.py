"""layer_similarity - how alike the hidden states of a model are: cosines, summed by groups.

Letters: S states (h_0, the input of the first layer, to h_L), T tokens, D hidden size, G groups.

A group is a set of tokens whose cosines are summed apart, for instance the vision tokens of one
sample. Per-sample means, token-weighted means and merging over processes all follow from the sums.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from interlace.errors import ShapeError
from interlace.ops import _extension
from interlace.ops._registry import Backend, Op, OpSample
from interlace.ops._spelling import spell

__all__ = ["EPS", "layer_similarity"]

EPS = 1e-8

# elements of one chunk of the reference, in the accumulation dtype: enough to keep a GPU busy,
# little beside the hidden states of any model worth scoring
_CHUNK_ELEMENTS = 1 << 22
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# kMostStates in csrc/cuda/layer_similarity.h: a kernel's arguments hold the addresses of all states
_MOST_STATES_CUDA = 128


def layer_similarity(
    hidden: Tensor | Sequence[Tensor],
    groups: Tensor,
    *,
    num_groups: int,
    max_offset: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum the cosines of every pair of hidden states over the tokens of each group.

    sums[g, i, j] = sum over t with groups[t] = g of
        <h_i[t], h_j[t]> / (max(|h_i[t]|, eps) max(|h_j[t]|, eps)),  eps = 1e-8

    So the cosine with a zero vector is 0, its own included. NaN, infinity and vectors whose squared
    norm leaves fp32 (|h| > 1.8e19) give NaN in the pairs and the group that they belong to, and
    nowhere else. Tokens outside every group are not read. No gradient flows through this op.

    Args:
        hidden: S >= 1 states, stacked [S, T, D] or a sequence of S tensors [T, D] of one dtype
            (fp32 | bf16 | fp16 | fp64) on one device; a sequence is used without stacking it.
        groups: group of every token, [T] int32, 0..num_groups - 1, or -1 for an ignored token.
        num_groups: G >= 0.
        max_offset: only pairs with |i - j| <= max_offset, 0..S - 1; None takes every pair.
        backend: "auto", "cuda", "triton", "cpp" or "torch".

    Returns:
        sums [G, S, S], symmetric, fp32 (fp64 for fp64 input), 0 outside the band; divided by the
        counts, cosines in [-1, 1]. counts [G] int64, tokens per group.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit, or a group is out of range (looked at on
            the CPU only; on a GPU such tokens are ignored, since looking would stall it).
        BackendError: a named backend cannot run these arguments; the message says why.

    Numerics: dots and norms in fp32, sums over tokens in fp64; deterministic, whatever the number
    of threads.
    Cost: reads S*T*D elements once; S*(S+1)/2 dots per token, or S*(max_offset+1) in a band. On a
    GPU all dots are taken whatever the band, and only up to 64 states are read once; beyond, a
    state is read once for every 32 others (in a band, for those near by). The Triton kernel puts
    S*(S+1)/2 numbers per token aside in between, 1 % of what it reads at S=37, D=4096 in bf16.
    """
    states = list(hidden.unbind(0)) if isinstance(hidden, Tensor) else list(hidden)
    _check(states, groups, num_groups, max_offset)
    sums, counts = OP([h.detach() for h in states], groups, num_groups, max_offset, backend=backend)
    return sums, counts


def reference(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> tuple[Tensor, Tensor]:
    """The meaning: per-token Gram matrices by chunks of tokens; the diagonal gives the norms."""
    num_states, (num_tokens, width) = len(hidden), hidden[0].shape
    exact = torch.promote_types(hidden[0].dtype, torch.float32)
    sums = hidden[0].new_zeros((num_groups + 1, num_states, num_states), dtype=torch.float64)
    # ignored tokens go to a slot of their own, as zeros: their values must not reach any sum
    valid = (groups >= 0) & (groups < num_groups)
    slots = torch.where(valid, groups, num_groups).long()
    chunk = max(1, _CHUNK_ELEMENTS // max(1, num_states * width))
    for start in range(0, num_tokens, chunk):
        part = slice(start, start + chunk)
        rows = torch.stack([h[part].to(exact) for h in hidden], dim=1)
        rows.masked_fill_(~valid[part, None, None], 0)
        gram = rows @ rows.mT
        scale = gram.diagonal(dim1=1, dim2=2).sqrt().clamp_min(EPS).reciprocal()
        cosines = gram * scale[:, :, None] * scale[:, None, :]
        # index_put_ and not index_add_: in a fixed order on every device
        sums.index_put_((slots[part],), cosines.double(), accumulate=True)
    reach = num_states - 1 if max_offset is None else max_offset
    lower = sums.tril().triu(-reach)
    sums = lower + lower.tril(-1).mT
    counts = groups.new_zeros(num_groups + 1, dtype=torch.int64)
    counts.index_put_((slots,), torch.ones_like(slots), accumulate=True)
    return sums[:num_groups].to(exact), counts[:num_groups].clone()


def _check(states: list[Tensor], groups: Tensor, num_groups: int, max_offset: int | None) -> None:
    if not states or states[0].dim() != 2:
        shape = tuple(states[0].shape) if states else "nothing"
        raise ShapeError(
            "layer_similarity expects hidden states [T, D], one or more, or stacked [S, T, D]; "
            f"got {shape} per state. Flatten batch and tokens first, h.flatten(0, 1)."
        )
    first = states[0]
    for number, state in enumerate(states):
        if (state.shape, state.dtype, state.device) != (first.shape, first.dtype, first.device):
            raise ShapeError(
                f"State {number} is {spell(state)}, but state 0 is {spell(first)}; "
                "all must be alike."
            )
    if not first.is_floating_point():
        raise ShapeError(f"The hidden states are {first.dtype}; expected a floating-point type.")
    expected = (first.shape[:1], torch.int32, first.device)
    if (groups.shape, groups.dtype, groups.device) != expected:
        raise ShapeError(
            f"groups is {spell(groups)}; expected torch.int32 ({first.shape[0]},) on "
            f"{first.device}: one group per token."
        )
    if num_groups < 0:
        raise ShapeError(f"num_groups is {num_groups}; expected 0 or more.")
    if max_offset is not None and not 0 <= max_offset < len(states):
        raise ShapeError(
            f"max_offset is {max_offset}; expected 0..{len(states) - 1} for {len(states)} states, "
            "or None for every pair."
        )
    if groups.is_cpu and groups.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in groups.aminmax())
        if low < -1 or high >= num_groups:
            raise ShapeError(
                f"groups holds values in {low}..{high}; expected 0..{num_groups - 1} "
                f"(num_groups = {num_groups}), or -1 for ignored tokens."
            )


def _fake(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(hidden[0].dtype, torch.float32)
    sums = hidden[0].new_empty((num_groups, len(hidden), len(hidden)), dtype=exact)
    return sums, groups.new_empty((num_groups,), dtype=torch.int64)


def _kernel_why_not(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> str | None:
    if hidden[0].dtype not in _DTYPES:
        return f"works on fp32, bf16 and fp16, got {hidden[0].dtype}"
    return None


def _gpu_why_not(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> str | None:
    if groups.numel() >= 2**31:
        return f"numbers tokens in 32 bits, got {groups.numel()} tokens; pass them in parts"
    return _kernel_why_not(hidden, groups, num_groups, max_offset)


def _cuda_why_not(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> str | None:
    if len(hidden) > _MOST_STATES_CUDA:
        return f"takes up to {_MOST_STATES_CUDA} states, got {len(hidden)}"
    return _gpu_why_not(hidden, groups, num_groups, max_offset)


def _cuda(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> tuple[Tensor, Tensor]:
    num_states, (num_tokens, width) = len(hidden), hidden[0].shape
    sums = groups.new_empty((num_groups, num_states, num_states), dtype=torch.float32)
    counts = groups.new_empty((num_groups,), dtype=torch.int64)
    if num_groups == 0:
        return sums, counts
    rows, groups = _dense_rows(hidden), groups.contiguous()
    device = groups.get_device()
    call = functools.partial(
        _extension.extension().layer_similarity_cuda,
        states=[h.data_ptr() for h in rows],
        row_strides=[h.stride(0) for h in rows],
        dtype=_DTYPES.index(hidden[0].dtype),
        groups=groups.data_ptr(),
        num_tokens=num_tokens,
        width=width,
        num_groups=num_groups,
        max_offset=num_states - 1 if max_offset is None else max_offset,
        sums=sums.data_ptr(),
        counts=counts.data_ptr(),
        device=device,
        stream=torch._C._cuda_getCurrentRawStream(device),
    )
    num_bytes = call(scratch=0)
    scratch = groups.new_empty(((num_bytes + 7) // 8,), dtype=torch.float64)
    call(scratch=scratch.data_ptr())
    return sums, counts


def _dense_rows(hidden: Sequence[Tensor]) -> list[Tensor]:
    """The states with the elements of a row side by side; rows may lie anywhere."""
    return [h if h.stride(1) == 1 or h.shape[1] <= 1 else h.contiguous() for h in hidden]


def _cpp(
    hidden: Sequence[Tensor],
    groups: Tensor,
    num_groups: int,
    max_offset: int | None,
    *,
    max_lanes: int = 16,
) -> tuple[Tensor, Tensor]:
    num_states, (num_tokens, width) = len(hidden), hidden[0].shape
    rows = _dense_rows(hidden)
    sums = torch.empty((num_groups, num_states, num_states), dtype=torch.float32)
    counts = torch.empty(num_groups, dtype=torch.int64)
    groups = groups.contiguous()
    _extension.extension().layer_similarity(
        states=[h.data_ptr() for h in rows],
        row_strides=[h.stride(0) for h in rows],
        dtype=_DTYPES.index(hidden[0].dtype),
        groups=groups.data_ptr(),
        num_tokens=num_tokens,
        width=width,
        num_groups=num_groups,
        max_offset=num_states - 1 if max_offset is None else max_offset,
        sums=sums.data_ptr(),
        counts=counts.data_ptr(),
        num_threads=torch.get_num_threads(),
        max_lanes=max_lanes,
    )
    return sums, counts


def _bytes_moved(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> int:
    read = sum(h.numel() * h.element_size() for h in hidden) + groups.numel() * 4
    return read + num_groups * (4 * len(hidden) ** 2 + 8)


def _flops(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> int:
    reach = len(hidden) - 1 if max_offset is None else max_offset
    pairs = sum(len(hidden) - offset for offset in range(reach + 1))
    return 2 * pairs * hidden[0].numel()


def _samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """Odd sizes, a band, nothing, one of each, masked and poisoned tokens, strides, magnitudes."""
    generator = torch.Generator().manual_seed(0)

    def states(num: int, tokens: int, width: int, scale: float = 1.0) -> list[Tensor]:
        walk = torch.randn(num, tokens, width, generator=generator).cumsum(0) * scale
        return list(walk.to(device, dtype).unbind(0))

    def groups(tokens: int, num: int, low: int = 0) -> Tensor:
        drawn = torch.randint(low, num, (tokens,), generator=generator, dtype=torch.int32)
        return drawn.to(device)

    masked = states(6, 29, 33)
    marks = groups(29, 3, low=-1)
    for h in masked:
        h[marks < 0] = float("nan")
    strided = [h[1::3, 5:22] for h in states(5, 40, 24)]
    columns = [h.T for h in states(4, 18, 13)]
    shared = [states(1, 1, 19)[0].expand(11, 19)] * 3
    zeros = states(5, 9, 16)
    zeros[2].zero_()
    broken = states(5, 12, 40)
    broken[1][7, 3] = float("nan")
    broken[3][2, 39] = float("inf")
    return [
        OpSample("odd", (states(7, 53, 129), groups(53, 2), 2, None)),
        OpSample("band", (states(11, 65, 259), groups(65, 3), 3, 3)),
        OpSample("diagonal", (states(6, 17, 31), groups(17, 1), 1, 0)),
        OpSample("deep", (states(37, 9, 1030), groups(9, 2), 2, None)),
        OpSample("wide_band", (states(37, 9, 515), groups(9, 2), 2, 7)),
        OpSample("aligned", (states(37, 7, 512), groups(7, 2), 2, None)),
        OpSample("more_states", (states(70, 3, 40), groups(3, 2), 2, None)),
        OpSample("band_of_more_states", (states(70, 2, 24), groups(2, 1), 1, 5)),
        OpSample("one", (states(1, 1, 1), groups(1, 1), 1, None)),
        OpSample("no_token", (states(3, 0, 8), groups(0, 2), 2, 1)),
        OpSample("no_width", (states(3, 4, 0), groups(4, 2), 2, None)),
        OpSample("no_group", (states(3, 4, 8), groups(4, 0, low=-1), 0, None)),
        OpSample("masked", (masked, marks, 3, 2)),
        OpSample("all_masked", (states(3, 5, 8), groups(5, 0, low=-1), 2, None)),
        OpSample("strided", (strided, groups(13, 2), 2, None)),
        OpSample("transposed", (columns, groups(13, 2), 2, 1)),
        OpSample("repeated_row", (shared, groups(11, 2), 2, None)),
        OpSample("zero_vector", (zeros, groups(9, 2), 2, None)),
        OpSample("not_finite", (broken, groups(12, 4), 4, 2)),
        OpSample("huge", (states(5, 21, 64, scale=1e4), groups(21, 2), 2, None)),
        OpSample("tiny", (states(5, 21, 64, scale=1e-7), groups(21, 2), 2, None)),
    ]


OP = Op(
    "layer_similarity",
    reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
    flops=_flops,
    backends=(
        Backend("cuda", _cuda, why_not=_cuda_why_not),
        Backend(
            "triton",
            "interlace.triton_kernels.layer_similarity:layer_similarity",
            why_not=_gpu_why_not,
        ),
        Backend("cpp", _cpp, why_not=_kernel_why_not),
    ),
)
