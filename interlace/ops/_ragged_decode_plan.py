"""How the GPU kernels of ragged_decode share the work out: from shapes alone, once per geometry.

A program (block of threads) handles one tile, which is a sequence, a kv head and a block of its
rows (token, query head), and one split of the keys. Lengths are on the device and change from step
to step, so the number of splits follows from the capacity of the cache; the kernels then cut the
keys that are really there into that many splits.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch

MAX_SPLITS = 128
# a window wider than any cache, small enough for 32-bit sums with positions
NO_WINDOW = 1 << 30
# a split below this many keys is not worth a program
_MIN_KEYS = 32
# more programs on one multiprocessor bring nothing
_MOST_RESIDENT = 4
# what starting a program and joining the splits cost, in units of one key's work
_START, _JOIN = 64, 128
# multiprocessors, and shared memory of each in bytes, assumed where there is no GPU
_ASSUMED = (132, 228 << 10)


@functools.cache
def num_splits(tiles: int, keys: int, shared: int, device: torch.device) -> int:
    """Choose the number of splits that finishes soonest.

    Programs run in waves of as many as the GPU holds at a time; the last wave lasts as long as the
    others, however few programs it has.

    Args:
        tiles: programs without any split, >= 1.
        keys: keys that a tile can have at most, >= 0.
        shared: shared memory of a program in bytes, > 0; it limits how many run at a time.
        device: the GPU.

    Returns:
        1..MAX_SPLITS; 1 needs no second launch.
    """
    multiprocessors, memory = _capacity(device)
    at_once = multiprocessors * max(1, min(_MOST_RESIDENT, memory // shared))

    def duration(splits: int) -> int:
        waves = -(-tiles * splits // at_once)
        return waves * (-(-keys // splits) + _START) + (_JOIN if splits > 1 else 0)

    return min(range(1, max(1, min(MAX_SPLITS, keys // _MIN_KEYS)) + 1), key=duration)


@functools.cache
def heads(q_start: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Kv heads that serve query heads: [heads, 3] int32 of kv head, first query head, their number.

    It is made once, because filling it from Python would stall the GPU and cannot be captured in a
    CUDA graph.
    """
    rows = [(j, a, b - a) for j, (a, b) in enumerate(pairwise(q_start)) if a < b]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@functools.cache
def _capacity(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, and shared memory of each in bytes."""
    if device.type != "cuda":
        return _ASSUMED
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_multiprocessor
