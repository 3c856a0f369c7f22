"""What the kernels of ragged_attention and its backward share: who does what, and loads of tiles.

Letters: B sequences, Tq query tokens, Tk keys, Hq query heads, Hkv key-value heads, D head size.

A head of D elements is worked on as one or two parts whose sizes are powers of two, as tensor cores
and Triton want them: 80 as 64 + 16, 96 as 64 + 32. Where D is no multiple of 16, the last part is
filled up with zeros.

A slot is a place in the grid for one block of one sequence. With slots_per_sequence > 0 every
sequence has that many. With 0 the slots of sequence b begin at cu_seqlens[b] // BLOCK + b: that
leaves room for each, and far fewer idle programs than B times the longest where lengths differ.
"""

from __future__ import annotations

import contextvars
import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def parts_of(head_dim: int) -> tuple[int, int]:
    """Sizes of the one or two parts of a head, the second 0 if there is only one."""
    filled = max(16, -(-head_dim // 16) * 16)
    first = 1 << (filled.bit_length() - 1)
    rest = filled - first
    # two parts of one size are one part of the next power of two
    second = 1 << (rest - 1).bit_length() if rest else 0
    return (2 * first, 0) if second == first else (first, second)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        block_m: queries of a program or a step.
        block_n: keys of a step or a program.
        num_warps: warps of a program.
        num_stages: tiles in flight, in steps.
        tma: tiles come by TMA.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def blocks(self) -> dict[str, int]:
        """Sizes of blocks, as kernels name them."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    def options(self) -> dict[str, int]:
        """What a launch takes."""
        return self.blocks() | {"num_warps": self.num_warps, "num_stages": self.num_stages}


# (bytes of an element, largest D) -> how to launch
Table = dict[tuple[int, int], Launch]


def choose(table: Table, size: int, head_dim: int) -> Launch:
    """The first launch for elements of `size` bytes and a head of `head_dim` in a table."""
    return next(
        launch
        for (bytes_each, most), launch in table.items()
        if bytes_each == size and head_dim <= most
    )


def interpreted() -> bool:
    """Whether triton interprets its kernels on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def slots(num_tokens: int, num_sequences: int, longest: int, block: int) -> tuple[int, int]:
    """Number of slots, and slots per sequence or 0; see above."""
    per_sequence = -(-longest // block)
    packed = num_tokens // block + num_sequences
    if num_sequences * per_sequence <= packed:
        return num_sequences * per_sequence, per_sequence
    return packed, 0


@functools.lru_cache(maxsize=1024)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Put whole numbers on a device, once, so that a layer's own are there when it is called."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def head_map(q_start: Sequence[int], device: torch.device) -> Tensor:
    """Key-value head of every query head, [Hq] int32."""
    groups = enumerate(pairwise(q_start))
    numbers = tuple(n for n, (begin, end) in groups for _ in range(begin, end))
    return on_device(numbers, device)


def side_by_side(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy if the elements of its rows do not lie side by side; None stays."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def on_hopper(tensor: Tensor) -> bool:
    """Whether a tensor lies on a GPU of Hopper's generation."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9


def on_blackwell(tensor: Tensor) -> bool:
    """Whether a tensor lies on a GPU of Blackwell's generation that has tensor memory."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 10


def fits_tma(tensor: Tensor) -> bool:
    """Whether TMA can fetch tiles of [tokens, D] of a tensor [tokens, heads, D]."""
    size = tensor.element_size()
    steps = [stride * size for stride in tensor.stride()[:2]]
    return tensor.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)


def fetchable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """On Hopper, tensors [tokens, heads, D] of 16 bits whose tiles TMA can fetch; else as they are.

    What TMA cannot fetch is copied, with zeros up to a D of whole 16 bytes. Pointers would do, but
    they give wrong numbers there: docs/decisions/0008.
    """
    size, head_dim = tensors[0].element_size(), tensors[0].shape[-1]
    if size != 2 or not on_hopper(tensors[0]):
        return tensors
    width = -(-head_dim // 8) * 8
    return tuple(
        each if width == head_dim and fits_tma(each) else _widened(each, width) for each in tensors
    )


def _widened(tensor: Tensor, width: int) -> Tensor:
    wide = tensor.new_zeros((*tensor.shape[:-1], width))
    wide[..., : tensor.shape[-1]] = tensor
    return wide


def launch_on(device: torch.device, run: Callable[[], None]) -> None:
    """Launch kernels on a device, with memory for the TMA descriptors that they make."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def launch() -> None:
        triton.set_allocator(allocate)
        run()

    index = device.index if device.type == "cuda" else -1
    with torch.cuda.device(index):
        # a context of its own: the caller's allocator stays as it is
        contextvars.copy_context().run(launch)


def by_group(q_start: Sequence[int], device: torch.device) -> Tensor:
    """Key-value heads, those with the most query heads first, [Hkv] int32."""
    sizes = [end - begin for begin, end in pairwise(q_start)]
    return on_device(tuple(sorted(range(len(sizes)), key=lambda n: -sizes[n])), device)


@triton.jit
def locate(
    cu_seqlens, slot, num_sequences, slots_per_sequence, BLOCK: tl.constexpr, SEARCH: tl.constexpr
):
    """Sequence of a slot, and the number of its block, which may lie beyond the sequence.

    SEARCH is 0 where every sequence has its slots_per_sequence, else num_sequences or more, a power
    of two.
    """
    if SEARCH > 0:
        number = tl.arange(0, SEARCH)
        begins = tl.load(cu_seqlens + number, mask=number < num_sequences, other=0)
        before = (begins // BLOCK + number <= slot) & (number < num_sequences)
        sequence = tl.sum(before.to(tl.int32), 0) - 1
        block = slot - tl.load(cu_seqlens + sequence) // BLOCK - sequence
    else:
        sequence = slot // slots_per_sequence
        block = slot - sequence * slots_per_sequence
    return sequence, block


@triton.jit
def span(cu_seqlens, sequence):
    """First token of a sequence, and its length."""
    begin = tl.load(cu_seqlens + sequence)
    return begin.to(tl.int64), tl.load(cu_seqlens + sequence + 1) - begin


@triton.jit
def load_tile(
    base,
    stride,
    row,
    num_rows,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows row.. and columns FIRST.. of a head, zeros beyond its end (of rows: only if EDGE)."""
    rows = tl.arange(0, ROWS)
    columns = FIRST + tl.arange(0, WIDTH)
    at = base + (row + rows).to(tl.int64)[:, None] * stride + columns[None, :]
    if EDGE:
        inside = (row + rows < num_rows)[:, None]
        if FIRST + WIDTH > HEAD_DIM:
            inside = inside & (columns < HEAD_DIM)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
    elif FIRST + WIDTH > HEAD_DIM:
        tile = tl.load(at, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(
    base,
    stride,
    row,
    num_rows,
    tile,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write what `load_tile` reads."""
    rows = tl.arange(0, ROWS)
    columns = FIRST + tl.arange(0, WIDTH)
    at = base + (row + rows).to(tl.int64)[:, None] * stride + columns[None, :]
    inside = (row + rows < num_rows)[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        inside = inside & (columns < HEAD_DIM)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)
