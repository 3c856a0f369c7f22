"""The keys and values of one new token per sequence, written into a static cache by one kernel.

Letters: B sequences, Hkv key-value heads, D head size, L capacity of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from interlace.triton_kernels._overlap import enter, options
from interlace.triton_kernels._variants import Variant

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def append_kernel(
    key,
    value,
    keys,
    values,
    length,
    num_heads,
    capacity,
    key_sequence_stride,
    key_head_stride,
    value_sequence_stride,
    value_head_stride,
    keys_sequence_stride,
    keys_head_stride,
    keys_token_stride,
    values_sequence_stride,
    values_head_stride,
    values_token_stride,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One head of one sequence."""
    enter(OVERLAP)
    sequence = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    place = tl.load(length).to(tl.int64)
    d = tl.arange(0, BLOCK)
    # a full cache stays as it is
    key_width = tl.where(place < capacity, KEY_WIDTH, 0)
    value_width = tl.where(place < capacity, VALUE_WIDTH, 0)
    key += sequence * key_sequence_stride + head * key_head_stride
    keys += sequence * keys_sequence_stride + head * keys_head_stride
    moved = tl.load(key + d, mask=d < KEY_WIDTH)
    tl.store(keys + place * keys_token_stride + d, moved, mask=d < key_width)
    value += sequence * value_sequence_stride + head * value_head_stride
    values += sequence * values_sequence_stride + head * values_head_stride
    moved = tl.load(value + d, mask=d < VALUE_WIDTH)
    tl.store(values + place * values_token_stride + d, moved, mask=d < value_width)


def append(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> None:
    """Write the keys and values of one token per sequence to place `length` of a cache.

    Args:
        key: [B, Hkv, 1, D], elements of a head side by side.
        value: [B, Hkv, 1, D'], alike.
        keys: [B, Hkv, L, D], of the same dtype, likewise side by side; written at `length`.
        values: [B, Hkv, L, D'], alike.
        length: one whole number on the device, 0..L - 1; at L nothing is written.
    """
    batch, num_heads, _, width = key.shape
    if batch * num_heads == 0:
        return
    append_kernel[(batch * num_heads,)](
        *(key, value, keys, values, length, num_heads, keys.shape[2]),
        *(*key.stride()[:2], *value.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
        KEY_WIDTH=width,
        VALUE_WIDTH=value.shape[3],
        BLOCK=triton.next_power_of_2(max(width, value.shape[3])),
        num_warps=1,
        **options(key.device),
    )


def variants() -> list[Variant]:
    """Heads of the usual size."""
    names = append_kernel.arg_names
    types = dict.fromkeys(("key", "value", "keys", "values"), "*bf16") | {"length": "*i64"}
    strides = tuple(name for name in names if name.endswith("_stride"))
    types |= dict.fromkeys(("num_heads", "capacity", *strides), "i32")
    constants = {"KEY_WIDTH": 128, "VALUE_WIDTH": 128, "BLOCK": 128}
    return [
        Variant(
            name=f"append, head 128{', overlapping' if overlap else ''}",
            kernel=append_kernel,
            types=types,
            constants=constants | {"OVERLAP": overlap},
            aligned=("key", "value", "keys", "values", *strides),
            num_warps=1,
            capabilities=(90, 100) if overlap else (80, 90, 100),
            expects=dict.fromkeys((90, 100), ("griddepcontrol.wait",)) if overlap else {},
        )
        for overlap in (False, True)
    ]
