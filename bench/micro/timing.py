"""Clocks for one device each, and rounds in which all contenders take turns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# a block of short calls on the CPU lasts at least this long, so that reading the clock is no matter
_BLOCK_SECONDS = 1e-3
# how long the GPU is kept busy before a call, so that the host has queued the call by then
_HEAD_START_CYCLES = 200_000
_MOST_CALLS = 100


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: how often every contender has its turn.
        turn_seconds: length of a turn, at least one call.
        patience_seconds: a contender that has used this much sits out the rounds that are left.
    """

    rounds: int = 5
    turn_seconds: float = 0.1
    patience_seconds: float = 6.0


FULL = {"cpu": Effort(), "cuda": Effort(turn_seconds=0.04, patience_seconds=2.0)}
QUICK = {
    "cpu": Effort(rounds=3, turn_seconds=0.03, patience_seconds=2.0),
    "cuda": Effort(rounds=3, turn_seconds=0.01, patience_seconds=0.5),
}


@dataclass(eq=False)
class Contender:
    """Something that is timed.

    Attributes:
        name: a backend of the op, or a baseline.
        is_backend: which of the two.
        call: runs it once.
        seconds: what calls took, one entry per call on a GPU and per block of calls on the CPU.
        host_seconds: until a call returned to Python, per entry of `seconds`; differs on a GPU.
    """

    name: str
    is_backend: bool
    call: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)

    def quantile(self, fraction: float) -> float:
        """Seconds below which a fraction, 0..1, of the entries lie."""
        return float(np.quantile(self.seconds, fraction))

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return self.quantile(0.5)


class Clock(Protocol):
    """Times calls on one device."""

    def turn(self, call: Callable[[], Any], seconds: float) -> list[tuple[float, float]]:
        """Call for about `seconds`, once at least; return seconds on the device and the host."""

    def describe(self) -> dict[str, Any]:
        """Say how it measures, for the results."""


class CpuClock:
    """Wall clock around blocks of calls; caches are left as the calls before left them."""

    def turn(self, call: Callable[[], Any], seconds: float) -> list[tuple[float, float]]:
        """Call for about `seconds`, once at least."""
        first = self._block(call, 1)
        found, used = [], first
        calls = max(1, round(_BLOCK_SECONDS / max(first, 1e-7)))
        if calls == 1:
            found.append((first, first))
        while not found or (used < seconds and len(found) < _MOST_CALLS):
            block = self._block(call, calls)
            used += block
            found.append((block / calls, block / calls))
        return found

    def describe(self) -> dict[str, Any]:
        """Say how it measures, for the results."""
        return {"clock": "perf_counter", "caches": "as the call before left them"}

    @staticmethod
    def _block(call: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start


class CudaClock:
    """CUDA events around single calls, each after the L2 cache was overwritten.

    The GPU sleeps before the overwriting, so a call is queued by the time its turn comes, and the
    events see the GPU's time alone; a call of very many launches still waits for the host, as it
    does in use. The host's own time is kept beside it.
    """

    def __init__(self, device: torch.device) -> None:
        self._l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self._flush = torch.empty(2 * self._l2_bytes, dtype=torch.int8, device=device)

    def turn(self, call: Callable[[], Any], seconds: float) -> list[tuple[float, float]]:
        """Call for about `seconds`, once at least."""
        [first] = self._calls(call, 1)
        count = min(_MOST_CALLS, int(seconds / max(first)))
        # the first call of a turn is dropped where more fit: it finds the GPU at another clock
        return self._calls(call, count) if count else [first]

    def describe(self) -> dict[str, Any]:
        """Say how it measures, for the results."""
        return {
            "clock": "CUDA events, one pair per call",
            "caches": "cold L2: a buffer of twice its size is overwritten before every call",
            "l2_bytes": self._l2_bytes,
            "flush_bytes": self._flush.numel(),
            "head_start_cycles": _HEAD_START_CYCLES,
        }

    def _calls(self, call: Callable[[], Any], count: int) -> list[tuple[float, float]]:
        events, host = [], []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_HEAD_START_CYCLES)
            self._flush.zero_()
            start.record()
            before = time.perf_counter()
            call()
            host.append(time.perf_counter() - before)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        device = [start.elapsed_time(end) * 1e-3 for start, end in events]
        return list(zip(device, host, strict=True))


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def take_turns(contenders: Sequence[Contender], clock: Clock, effort: Effort) -> None:
    """Time contenders in rounds, every other round in reverse order.

    So whatever drifts (clock rates, temperature, other programs) meets all of them alike. Every
    contender has been called before.
    """
    used = dict.fromkeys(range(len(contenders)), 0.0)
    for number in range(effort.rounds):
        order = list(enumerate(contenders))
        for place, contender in reversed(order) if number % 2 else order:
            if used[place] > effort.patience_seconds:
                continue
            before = time.perf_counter()
            for seconds, host in clock.turn(contender.call, effort.turn_seconds):
                contender.seconds.append(seconds)
                contender.host_seconds.append(host)
            used[place] += time.perf_counter() - before
