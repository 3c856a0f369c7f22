"""The compiled part, interlace._C: loads it on first use and remembers why it could not."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from interlace.errors import BackendError

if TYPE_CHECKING:
    from types import ModuleType

NAME = "interlace._C"
_ADVICE = "install a C++17 compiler and reinstall the package (pip install -v says why it failed)"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(NAME), None
    except ModuleNotFoundError as error:
        if error.name != NAME:
            return None, f"{NAME} does not load: {error}"
        return None, f"the compiled part {NAME} was not built; {_ADVICE}"
    except ImportError as error:
        return None, f"{NAME} does not load: {error}"


def why_not(function: str | None = None) -> str | None:
    """Say why the compiled part, or one function of it, cannot be used; None if it can.

    Args:
        function: name of a function of the compiled part; None asks for the part as a whole.
    """
    module, reason = _load()
    if module is not None and function is not None and not hasattr(module, function):
        return f"{NAME} has no {function}: it was built from other sources; reinstall the package"
    return reason


def cuda_architectures() -> str | None:
    """Name the GPU generations that the compiled part has machine code for; None without any."""
    module, _ = _load()
    return getattr(module, "cuda_architectures", None)


def extension() -> ModuleType:
    """Return the compiled part.

    Raises:
        BackendError: it is not there; the message says why.
    """
    module, reason = _load()
    if module is None:
        raise BackendError(f"The compiled kernels cannot be used: {reason}.")
    return module
