"""layer_similarity on a GPU: Gram matrices of all states, token by token, on the matrix units.

Letters: S states, T tokens, D width, G groups.

Four kernels, one after the other, of which the second takes nearly all the time; the host looks at
no value in between:

- `order_kernel` sorts the tokens by group (stable), so that ignored ones drop out;
- `cosine_kernel` reads every state of one token once and multiplies them with each other. The
  diagonal has the norms, so the cosines follow from the product alone;
- `sum_kernel` adds up the cosines of a slice of the sorted tokens, apart for each group. From slice
  to slice the groups only grow, so slice + group is a free place for what comes of them;
- `merge_kernel` adds up the slices of a group.

No more than 64 states fit on chip. More are cut into panels of 32, and a pass takes the states of
two panels. Passes are numbered by how far their panels lie apart, then by the lower one, so that
those that a band needs come first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from interlace.triton_kernels._variants import Variant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_EPS = tl.constexpr(1e-8)
_PANEL = tl.constexpr(32)
_NO_GROUP = tl.constexpr(2**31 - 1)

# tokens of a slice; pairs, and slices or outputs, that a program of the small kernels works on
_SHARE = 64
_BLOCK_PAIRS = 128
_BLOCK_OUT, _BLOCK_SLICES = 64, 32
_MOST_ORDERED = 8192


@dataclass(frozen=True)
class _Config:
    """How `cosine_kernel` is launched.

    Attributes:
        block_d: elements of every state that are multiplied at a time.
        num_warps: warps of a program.
        num_stages: blocks in flight, the current one included.
    """

    block_d: int
    num_warps: int
    num_stages: int


_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# by rows of a pass and bytes of an element
_CONFIGS = {
    (16, 2): _Config(128, 2, 4),
    (32, 2): _Config(128, 4, 4),
    (64, 2): _Config(128, 4, 4),
    (16, 4): _Config(64, 2, 4),
    (32, 4): _Config(32, 4, 4),
    (64, 4): _Config(32, 8, 4),
}
# rows that start anywhere are loaded element by element
_UNALIGNED = _Config(16, 8, 2)


@triton.jit
def order_kernel(groups, order, starts, counts, num_tokens, num_groups, BLOCK: tl.constexpr):
    """Write token numbers sorted by group, where each group starts, and tokens per group.

    One program per group and block of tokens. It finds the place of its tokens by counting those
    that come before.
    """
    group = tl.program_id(0) % num_groups
    own = tl.program_id(0) // num_groups * BLOCK
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], tl.int32)
    earlier = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_tokens, BLOCK):
        marks = tl.load(groups + first + lane, mask=lane < num_tokens - first, other=-1)
        lower += ((marks >= 0) & (marks < group)).to(tl.int32)
        earlier += ((marks == group) & (first < own)).to(tl.int32)
    start = tl.sum(lower)
    count = tl.sum(earlier)
    marks = tl.load(groups + own + lane, mask=lane < num_tokens - own, other=-1)
    mine = (marks == group).to(tl.int32)
    tl.store(order + start + count + tl.cumsum(mine) - 1, own + lane, mask=mine != 0)
    if own == 0:
        tl.store(starts + group, start)
    if own + BLOCK >= num_tokens:
        count += tl.sum(mine)
        tl.store(counts + group, count.to(tl.int64))
        if group == num_groups - 1:
            tl.store(starts + num_groups, start + count)


@triton.jit
def cosine_kernel(
    table,
    order,
    starts,
    cosines,
    num_states,
    width,
    num_groups,
    num_passes,
    num_pairs,
    zero,
    ELEMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the cosines of one token and one pass: lower triangle, row after row.

    `table` has the addresses of the states, their row strides in elements, and the lower and higher
    panels of the passes. `zero` is 0.0, which the compiler must not know. ALIGNMENT is 1 or the
    elements in 16 bytes.
    """
    # neighbouring programs are passes of one token: they read the same rows
    which = tl.program_id(0) % num_passes
    position = tl.program_id(0) // num_passes
    if position >= tl.load(starts + num_groups):
        return
    low = tl.load(table + 2 * num_states + which)
    high = tl.load(table + 2 * num_states + num_passes + which)
    token = tl.load(order + position).to(tl.int64)
    row = tl.arange(0, ROWS)
    state = tl.where(row < _PANEL, low, high - 1) * _PANEL + row
    used = state < num_states
    base = tl.load(table + state, mask=used, other=0).to(tl.pointer_type(ELEMENT))
    stride = tl.load(table + num_states + state, mask=used, other=0)
    # without these hints the rows would be loaded element by element
    stride = tl.multiple_of(stride, ALIGNMENT)
    if ALIGNMENT > 1:
        base = tl.multiple_of(base, 16)
    rows = base + token * stride
    column = tl.arange(0, BLOCK_D)
    dots = tl.zeros([ROWS, ROWS], tl.float32)
    for d in tl.range(0, width, BLOCK_D, num_stages=STAGES):
        inside = used[:, None] & (column[None, :] < width - d)
        tile = tl.load(rows[:, None] + (d + column)[None, :], mask=inside, other=0.0)
        if UPCAST:
            tile = tile.to(tl.float32)
        # The matrix units round every partial sum towards zero. Starting anew with each block and
        # adding up outside keeps that from growing with the width; a zero that is seen as one would
        # let the compiler put the two together again.
        empty = tl.zeros([ROWS, ROWS], tl.float32) + zero
        dots += tl.dot(tile, tile.T, empty, input_precision=PRECISION)
    norms = tl.sqrt_rn(tl.sum(tl.where(row[:, None] == row[None, :], dots, 0.0), axis=1))
    # written so that NaN stays NaN
    scale = tl.div_rn(1.0, tl.where(norms < _EPS, _EPS, norms))
    pair = row[:, None] * (row[:, None] + 1) // 2 + row[None, :]
    wanted = (row[:, None] >= row[None, :]) & used[:, None]
    out = cosines + tl.program_id(0).to(tl.int64) * num_pairs
    tl.store(out + pair, dots * scale[:, None] * scale[None, :], mask=wanted)


@triton.jit
def sum_kernel(
    groups,
    order,
    starts,
    cosines,
    records,
    num_groups,
    num_passes,
    num_pairs,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sums of a slice of tokens, [slice + group, pass, pairs] fp64, for each group."""
    num_blocks = (num_pairs + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % num_blocks
    which = tl.program_id(0) // num_blocks % num_passes
    slice_id = tl.program_id(0) // num_blocks // num_passes
    num_tokens = tl.load(starts + num_groups)
    if slice_id * SHARE >= num_tokens:
        return
    pair = block * BLOCK + tl.arange(0, BLOCK)
    position = slice_id * SHARE + tl.arange(0, SHARE)
    present = position < num_tokens
    token = tl.load(order + position, mask=present, other=0)
    group = tl.load(groups + token, mask=present, other=_NO_GROUP)
    out = cosines + (position.to(tl.int64) * num_passes + which)[:, None] * num_pairs
    wanted = present[:, None] & (pair[None, :] < num_pairs)
    values = tl.load(out + pair[None, :], mask=wanted, other=0.0)
    current = tl.min(group)
    while current < _NO_GROUP:
        # chosen, not multiplied by 0 or 1: NaN must not reach other groups
        total = tl.sum(tl.where((group == current)[:, None], values, 0.0).to(tl.float64), axis=0)
        record = ((slice_id + current) * num_passes + which).to(tl.int64) * num_pairs
        tl.store(records + record + pair, total, mask=pair < num_pairs)
        current = tl.min(tl.where(group > current, group, _NO_GROUP))


@triton.jit
def merge_kernel(
    starts,
    records,
    sums,
    num_states,
    num_panels,
    num_passes,
    num_pairs,
    max_offset,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Write the sums of a group, [S, S], from those of its slices."""
    num_blocks = (num_states * num_states + BLOCK - 1) // BLOCK
    group = tl.program_id(0) // num_blocks
    place = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_states * num_states
    late = tl.maximum(place // num_states, place % num_states)
    early = tl.minimum(place // num_states, place % num_states)
    wanted = inside & (late - early <= max_offset)
    # the pass of two panels; of one panel, that with the panel before it
    high = tl.maximum(late // _PANEL, 1)
    low = tl.minimum(early // _PANEL, high - 1)
    apart = high - low
    which = (apart - 1) * num_panels - apart * (apart - 1) // 2 + low
    row = late - tl.where(late >= high * _PANEL, high - 1, low) * _PANEL
    column = early - tl.where(early >= high * _PANEL, high - 1, low) * _PANEL
    pair = which * num_pairs + row * (row + 1) // 2 + column

    begin = tl.load(starts + group)
    end = tl.load(starts + group + 1)
    first = begin // SHARE
    stop = tl.where(begin < end, (end + SHARE - 1) // SHARE, first)
    total = tl.zeros([SLICES, BLOCK], tl.float64)
    for start in range(first, stop, SLICES):
        slice_id = start + tl.arange(0, SLICES)
        record = (slice_id + group).to(tl.int64) * num_passes * num_pairs
        mask = (slice_id < stop)[:, None] & wanted[None, :]
        total += tl.load(records + record[:, None] + pair[None, :], mask=mask, other=0.0)
    out = group.to(tl.int64) * num_states * num_states + place
    tl.store(sums + out, tl.sum(total, axis=0).to(tl.float32), mask=inside)


def layer_similarity(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> tuple[Tensor, Tensor]:
    """Run the op; see interlace/ops/layer_similarity.py for its arguments.

    The states are fp32, bf16 or fp16, fewer than 2^31 tokens.
    """
    with torch.cuda.device_of(groups):
        return _run(hidden, groups, num_groups, max_offset)


def _run(
    hidden: Sequence[Tensor], groups: Tensor, num_groups: int, max_offset: int | None
) -> tuple[Tensor, Tensor]:
    num_states, (num_tokens, width) = len(hidden), hidden[0].shape
    sums = hidden[0].new_empty((num_groups, num_states, num_states), dtype=torch.float32)
    counts = groups.new_empty((num_groups,), dtype=torch.int64)
    if num_groups == 0:
        return sums, counts
    # rows may lie anywhere, but the elements of a row lie side by side
    rows = [h if h.stride(1) == 1 or width <= 1 else h.contiguous() for h in hidden]
    groups = groups.contiguous()
    reach = num_states - 1 if max_offset is None else max_offset
    num_panels = max(2, triton.cdiv(num_states, _PANEL.value))
    passes = _passes(num_panels, reach)
    num_passes = len(passes)
    most_rows = min(num_states, 2 * _PANEL.value)
    num_pairs = most_rows * (most_rows + 1) // 2
    num_slices = triton.cdiv(num_tokens, _SHARE)

    order = groups.new_empty((num_tokens,))
    starts = groups.new_empty((num_groups + 1,))
    cosines = sums.new_empty((num_tokens, num_passes, num_pairs))
    records = sums.new_empty((num_slices + num_groups, num_passes, num_pairs), dtype=torch.float64)

    block = min(_MOST_ORDERED, max(16, triton.next_power_of_2(num_tokens)))
    order_kernel[(max(1, triton.cdiv(num_tokens, block)) * num_groups,)](
        groups, order, starts, counts, num_tokens, num_groups, BLOCK=block, num_warps=8
    )
    if num_tokens:
        constants, config = _form(rows)
        cosine_kernel[(num_tokens * num_passes,)](
            _table(rows, passes),
            order,
            starts,
            cosines,
            num_states,
            width,
            num_groups,
            num_passes,
            num_pairs,
            0.0,
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        sum_kernel[(num_slices * num_passes * triton.cdiv(num_pairs, _BLOCK_PAIRS),)](
            groups,
            order,
            starts,
            cosines,
            records,
            num_groups,
            num_passes,
            num_pairs,
            SHARE=_SHARE,
            BLOCK=_BLOCK_PAIRS,
            num_warps=8,
        )
    merge_kernel[(num_groups * triton.cdiv(num_states**2, _BLOCK_OUT),)](
        starts,
        records,
        sums,
        num_states,
        num_panels,
        num_passes,
        num_pairs,
        reach,
        SHARE=_SHARE,
        BLOCK=_BLOCK_OUT,
        SLICES=_BLOCK_SLICES,
        num_warps=4,
    )
    return sums, counts


def _passes(num_panels: int, max_offset: int) -> list[tuple[int, int]]:
    """The two panels of every pass that has pairs at most `max_offset` apart."""
    size = _PANEL.value
    return [
        (low, low + apart)
        for apart in range(1, num_panels)
        if apart == 1 or (apart - 1) * size < max_offset
        for low in range(num_panels - apart)
    ]


def _table(rows: Sequence[Tensor], passes: list[tuple[int, int]]) -> Tensor:
    """What `cosine_kernel` calls a table, on the device of the states."""
    values = [[h.data_ptr() for h in rows], [h.stride(0) for h in rows], *zip(*passes, strict=True)]
    table = torch.tensor([each for part in values for each in part], dtype=torch.int64)
    if rows[0].is_cuda:
        # from pinned memory the copy does not make the host wait
        table = table.pin_memory().to(rows[0].device, non_blocking=True)
    return table


def _form(rows: Sequence[Tensor]) -> tuple[dict[str, Any], _Config]:
    """The compiled form of `cosine_kernel` for given states."""
    pack = 16 // rows[0].element_size()
    aligned = all(h.data_ptr() % 16 == 0 and h.stride(0) % pack == 0 for h in rows)
    return _constants(len(rows), rows[0].dtype, aligned, interpreted=triton.knobs.runtime.interpret)


def _constants(
    num_states: int, dtype: torch.dtype, aligned: bool, *, interpreted: bool = False
) -> tuple[dict[str, Any], _Config]:
    num_rows = min(2 * _PANEL.value, max(16, triton.next_power_of_2(num_states)))
    # interpreting takes as long for a small block as for a large one
    config = _CONFIGS[num_rows, dtype.itemsize] if aligned or interpreted else _UNALIGNED
    constants = {
        "ELEMENT": _ELEMENTS[dtype],
        "ROWS": num_rows,
        "BLOCK_D": config.block_d,
        "STAGES": config.num_stages,
        "ALIGNMENT": 16 // dtype.itemsize if aligned else 1,
        # fp32 as three bf16 each, and the six products that matter: as exact as fp32. The
        # interpreter does not know it, and multiplies in fp32.
        "PRECISION": "bf16x6" if dtype == torch.float32 and not interpreted else "ieee",
        "UPCAST": interpreted,
    }
    return constants, config


def variants() -> list[Variant]:
    """Forms for Qwen3-VL (37 states), CLIP's text encoder (13) and vision encoder (25)."""
    kinds = {
        "table": "*i64",
        "groups": "*i32",
        "order": "*i32",
        "starts": "*i32",
        "counts": "*i64",
        "cosines": "*fp32",
        "records": "*fp64",
        "sums": "*fp32",
        "zero": "fp32",
    }

    def variant(name: str, kernel: Any, constants: dict[str, Any], **options: Any) -> Variant:
        types = {n: kinds.get(n, "i32") for n in kernel.arg_names if n not in constants}
        pointers = tuple(n for n, kind in types.items() if kind.startswith("*"))
        return Variant(name, kernel, types, constants, **({"aligned": pointers} | options))

    found = []
    for dtype, num_states, aligned in (
        (torch.bfloat16, 37, True),
        (torch.bfloat16, 25, True),
        (torch.bfloat16, 13, True),
        (torch.bfloat16, 37, False),
        (torch.float16, 37, True),
        (torch.float32, 37, True),
        (torch.float32, 25, True),
        (torch.float32, 37, False),
    ):
        constants, config = _constants(num_states, dtype, aligned)
        copies = ("cp.async",) if aligned else ()
        units = ("wgmma.mma_async",) if num_states > _PANEL.value else ("mma.sync",)
        name = f"{dtype}, {num_states} states{'' if aligned else ', unaligned'}"
        made = variant(
            name.removeprefix("torch."),
            cosine_kernel,
            constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            expects={80: (*copies, "mma.sync"), 90: (*copies, *units), 100: copies},
        )
        width = ("width",) if aligned else ()
        found.append(dataclasses.replace(made, aligned=(*made.aligned, *width)))
    found += [
        variant("order", order_kernel, {"BLOCK": _MOST_ORDERED}, num_warps=8),
        variant("sum", sum_kernel, {"SHARE": _SHARE, "BLOCK": _BLOCK_PAIRS}, num_warps=8),
        variant(
            "merge", merge_kernel, {"SHARE": _SHARE, "BLOCK": _BLOCK_OUT, "SLICES": _BLOCK_SLICES}
        ),
    ]
    return found
