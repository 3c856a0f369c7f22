"""Which backend is asked for, by whom, and how a refusal is worded."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interlace.errors import BackendError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ORDER = ("cuda", "triton", "cpp", "torch")
VARIABLE = "INTERLACE_BACKEND"

_log = logging.getLogger("interlace.ops")
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every op called inside the `with` block.

    A request inside a call (`backend="torch"`) goes before it; it goes before INTERLACE_BACKEND.
    Code compiled by torch.compile obeys the block it is called in.

    Args:
        name: "cuda", "triton", "cpp", "torch", or "auto" for the first that can serve.

    Raises:
        BackendError: the name is unknown. An op that the backend cannot serve raises when called.
    """
    _check(name, "backend")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def resolve(requested: str) -> str:
    """Return what is asked for, "auto" or a backend: by the call, the block or the environment."""
    if requested != "auto":
        return _check(requested, "backend")
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _check(os.environ.get(VARIABLE) or "auto", f"backend in {VARIABLE}")


def in_words(reasons: Iterable[tuple[str, str | None]]) -> str:
    """Word the reasons of all backends."""
    return "; ".join(f"{name}: {reason or 'can serve'}" for name, reason in reasons)


def device_of(args: Iterable[Any]) -> torch.device:
    """Return the device of the first tensor among an op's arguments, those in lists included."""
    for arg in args:
        tensor = arg[0] if isinstance(arg, list | tuple) and arg else arg
        if isinstance(tensor, Tensor):
            return tensor.device
    return torch.device("cpu")


def warn_of_fallback(op: str, reasons: list[tuple[str, str | None]]) -> None:
    """Log that GPU tensors run on the torch backend, once per op and reason."""
    _warn_once(op, in_words(reasons[:-1]))


@functools.cache
def _warn_once(op: str, words: str) -> None:
    _log.warning("%s runs GPU tensors on the slower torch backend, because %s", op, words)


def _check(name: str, kind: str) -> str:
    if name != "auto" and name not in ORDER:
        raise BackendError(unknown_name(kind, name, ("auto", *ORDER)))
    return name
