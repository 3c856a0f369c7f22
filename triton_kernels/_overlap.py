"""Programmatic dependent launch in Triton; `interlace/ops/_overlap.py` says what it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from interlace.ops import _overlap

if TYPE_CHECKING:
    import torch


def options(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch for a kernel that has OVERLAP, a compile-time constant."""
    allowed = _overlap.allowed(device)
    return {"OVERLAP": True, "launch_pdl": True} if allowed else {"OVERLAP": False}


@triton.jit
def enter(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait for those before: first thing in a kernel."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
