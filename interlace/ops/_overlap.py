"""Kernels that start before the one in front of them has ended: programmatic dependent launch.

A kernel launched this way is on its multiprocessors, and has its weights on the way, when its
inputs are complete; only then it goes on. That hides what starting a kernel costs, and much of the
time of small kernels between large ones. Nothing is read early but weights, so whoever asks for it
promises that no kernel in flight writes weights. A recorded step of a decoder can promise that.

Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_ALLOWED = ContextVar("interlace_overlap", default=False)
# of the first GPUs that can
_CAPABILITY = (9, 0)


@contextlib.contextmanager
def overlapping() -> Iterator[None]:
    """Let kernels of this package overlap; no kernel in flight may write weights meanwhile."""
    token = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def allowed(device: torch.device) -> bool:
    """Tell whether kernels on a device are to overlap."""
    return _ALLOWED.get() and device.type == "cuda" and not obstacle(device)


@functools.cache
def obstacle(device: torch.device) -> str:
    """Say why kernels on a GPU cannot overlap; "" where they can."""
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return "kernels overlap on NVIDIA GPUs, with triton installed"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "kernels overlap on Hopper GPUs or later"
    return ""
