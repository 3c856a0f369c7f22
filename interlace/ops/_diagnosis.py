"""What runs where on this machine, and why; shown by `interlace ops` and `interlace doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from interlace.errors import BackendError, unknown_name
from interlace.ops import _extension, _order
from interlace.ops._registry import OPS
from interlace.ops._selection import ORDER, resolve

if TYPE_CHECKING:
    from interlace.ops._registry import Op

_PACKAGES = (
    "interlace-vlm",
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "safetensors",
    "numpy",
)


class Row(NamedTuple):
    """One line of `table`.

    Attributes:
        op: the op's name.
        backend: "cuda", "triton", "cpp" or "torch".
        reason: why the backend cannot serve the op on any device of this machine; None if it can.
    """

    op: str
    backend: str
    reason: str | None


def explain(op: str, *args: Any) -> list[tuple[str, str | None]]:
    """Say for every backend, in order, why it cannot serve an op on given arguments.

    Args:
        op: the op's name, such as "layer_similarity".
        args: the op's arguments in the order of its reference.

    Returns:
        (backend, reason) pairs; the reason is None where the backend can serve.

    Raises:
        BackendError: there is no op of that name.
    """
    if op not in OPS:
        raise BackendError(unknown_name("op", op, OPS))
    return OPS[op].explain(*args)


def table() -> list[Row]:
    """List every op and backend of this machine, with the reason where it cannot serve.

    The reasons are those for the op's first fp32 sample, on the CPU and on the GPU if there is one.
    """
    return [Row(op.name, backend, _reason(op, backend)) for op in OPS.values() for backend in ORDER]


def _reason(op: Op, backend: str) -> str | None:
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    samples = [op.samples(torch.device(kind), torch.float32)[0] for kind in kinds]
    reasons = [dict(op.explain(*sample.args))[backend] for sample in samples]
    return None if None in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))


def doctor() -> dict[str, str]:
    """Describe the installation in words.

    Returns:
        "python", "platform", the packages by name, "threads" (CPU threads of torch), "devices"
        (GPUs with their compute capability), "order" (whether the order of the backends was
        measured on them), "backend" (what INTERLACE_BACKEND asks for), "extension" (the compiled
        part: "loaded", or why not) and "cuda kernels" (what GPUs they are built for, or why not).
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = {index: torch.cuda.get_device_name(index) for index in range(count)}
    capabilities = {index: torch.cuda.get_device_capability(index) for index in gpus}
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(
            f"{name} (compute capability {'.'.join(map(str, capabilities[index]))})"
            for index, name in gpus.items()
        )
        or "no GPU",
        "order": ", ".join(_measured(name) for name in dict.fromkeys(gpus.values()))
        or "the general one: " + ", ".join(ORDER),
        "backend": resolve("auto"),
        "extension": _extension.why_not() or "loaded",
        "cuda kernels": _cuda_kernels(),
    }


def _measured(gpu: str) -> str:
    if gpu in _order.measured():
        return f"measured on {gpu}"
    return f"not measured on {gpu}, so the general one: {', '.join(ORDER)}"


def _cuda_kernels() -> str:
    reason, architectures = _extension.why_not(), _extension.cuda_architectures()
    if reason is not None:
        return "not built: there is no compiled part"
    if architectures is None:
        return "not built: nvcc was not found, or was not wanted, when the package was installed"
    return f"built for {architectures}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
