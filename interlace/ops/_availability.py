"""Whether a backend is there and fits the device of the tensors: the same question for every op."""

from __future__ import annotations

import functools
import importlib.util

import torch

from interlace.ops import _extension

# Ampere: the kernels use its asynchronous copies and its bf16 matrix units
MIN_CAPABILITY = (8, 0)


def why_not(backend: str, op: str, device: torch.device) -> str | None:
    """Say why a backend cannot serve an op's arguments, whatever their shapes; None if it can.

    Args:
        backend: "cuda", "triton" or "cpp".
        op: the op's name. Its compiled function is called the same, `<op>_cuda` for a GPU.
        device: of the op's tensors.
    """
    if backend == "cpp":
        if device.type != "cpu":
            return _elsewhere("CPU", device)
        return _extension.why_not(op)
    if device.type != "cuda":
        return _elsewhere("GPU", device)
    if torch.version.hip is not None:
        return "works on NVIDIA GPUs, got an AMD GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (MIN_CAPABILITY, capability))
        return f"needs a GPU of compute capability {needed} or more, got {found}"
    if backend == "cuda":
        return _extension.why_not(f"{op}_cuda")
    return _triton_why_not()


# worded once: every call on the CPU asks the backends for GPUs first
@functools.cache
def _elsewhere(kind: str, device: torch.device) -> str:
    return f"works on {kind} tensors, got {device}"


@functools.cache
def _triton_why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install interlace-vlm[triton]"
    return None
