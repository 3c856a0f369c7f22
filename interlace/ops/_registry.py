"""The machine behind every op: one contract, many backends.

An op is its reference, a plain PyTorch function. The reference is the meaning, the backend of last
resort and the oracle of the tests. Implementations are listed beside it, each with a `why_not` that
says in words why it cannot serve given arguments. The first one that has nothing to say runs.

Ops are registered in the `interlace` namespace by `torch.library.Library.define` and `impl`, so
that torch.compile sees one opaque node and a call costs microseconds.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from interlace.errors import BackendError
from interlace.ops import _availability, _order, _selection
from interlace.ops._autograd import Backward, differentiable
from interlace.ops._budget import Budget

OPS: dict[str, Op] = {}

_LIBRARY: Any = torch.library.Library("interlace", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: "cuda", "triton" or "cpp"; "torch" is the reference and needs no entry.
        target: the implementation, called with the op's arguments; a callable, or
            "module:function", which is imported on the first call.
        why_not: called with the op's arguments; a sentence that says why the implementation cannot
            serve them, or None. Reads dtype, shape and stride, never values and never the
            environment. Whether the backend is there and fits the device is asked before, for all
            ops alike (`interlace/ops/_availability.py`).
    """

    name: str
    target: Callable[..., Any] | str
    why_not: Callable[..., str | None]

    def refusal(self, op: str, args: tuple[Any, ...], device: torch.device) -> str | None:
        """Say why the implementation cannot serve an op's arguments here; None if it can."""
        return _availability.why_not(self.name, op, device) or self.why_not(*args)

    def run(self, *args: Any) -> Any:
        """Call the implementation."""
        if isinstance(self.target, str):
            module, function = self.target.split(":")
            return getattr(importlib.import_module(module), function)(*args)
        return self.target(*args)


@dataclass(frozen=True)
class OpSample:
    """Arguments that an op is tested, compiled and timed with.

    Attributes:
        name: what is special about them.
        args: the op's arguments.
    """

    name: str
    args: tuple[Any, ...]


@dataclass(eq=False)
class Op:
    """The contract of an op. Creating one registers it.

    Attributes:
        name: the op's name, the stem of its files.
        reference: the meaning, plain PyTorch. Its annotations give the schema, so they are plain
            types that exist when it is defined, and no argument has a default. fp64 inputs are
            computed in fp64 throughout. It neither alters nor returns its inputs.
        fake: same arguments, returns empty outputs of the right shape, dtype and device.
        samples: (device, dtype) -> arguments to test with: odd sizes, strided, masked, empty, huge.
        bytes_moved: arguments -> bytes that any implementation has to read and write.
        flops: arguments -> floating-point operations that the op consists of.
        dtypes: the floating-point types that the samples are drawn in.
        backends: implementations other than the reference.
        backward: how gradients are computed; None for an op that has none.
        budget: the error allowed beyond the reference's own.
        deterministic: a second run gives the same bits.
        parameters: names of the reference's arguments.
    """

    name: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], list[OpSample]]
    bytes_moved: Callable[..., int]
    flops: Callable[..., int]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    backends: tuple[Backend, ...] = ()
    backward: Backward | None = None
    budget: Budget = field(default_factory=Budget)
    deterministic: bool = True
    _call: Callable[..., Any] = field(init=False, repr=False)
    _by_name: dict[str, Backend] = field(init=False, repr=False)
    parameters: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.reference).parameters
        if any(parameter.default is not parameter.empty for parameter in parameters.values()):
            # the dispatcher leaves out arguments that equal their default
            raise ValueError(f"The reference of {self.name} must not have default arguments.")
        self.parameters = tuple(parameters)
        self._by_name = {backend.name: backend for backend in self.backends}
        arguments, returns = torch.library.infer_schema(self.reference, mutates_args=()).split(
            ") ->"
        )
        # every op takes the backend last, so that compiled code keeps an explicit request
        _LIBRARY.define(f"{self.name}{arguments}, str backend) ->{returns}")
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"interlace::{self.name}", self._run_fake, lib=_LIBRARY)
        overload: Any = getattr(torch.ops.interlace, self.name).default
        self._call = overload
        if self.backward is not None:
            num_outputs = len(overload._schema.returns)
            self._call = differentiable(self._call, self.parameters, num_outputs, self.backward)
        OPS[self.name] = self

    def __call__(self, *args: Any, backend: str = "auto") -> Any:
        """Run the op; see `choose` for the meaning of `backend`."""
        return self._call(*args, backend)

    def explain(self, *args: Any) -> list[tuple[str, str | None]]:
        """Say for every backend, in order, why it cannot serve the arguments; None if it can."""
        device = _selection.device_of(args)
        reasons = {b.name: b.refusal(self.name, args, device) for b in self.backends}
        reasons["torch"] = None
        return [
            (name, reasons.get(name, f"{self.name} has no {name} kernel"))
            for name in _selection.ORDER
        ]

    def choose(self, args: tuple[Any, ...], requested: str = "auto") -> str:
        """Name the backend that serves the arguments.

        Args:
            args: the op's arguments.
            requested: "auto", "cuda", "triton", "cpp" or "torch". "auto" looks at
                `interlace.ops.backend`, then at INTERLACE_BACKEND; without these it is the first
                backend that can serve.

        Raises:
            BackendError: the name is unknown, or an explicitly requested backend cannot serve; the
                message gives the reasons of all backends.
        """
        wanted = _selection.resolve(requested)
        if wanted == "auto":
            return self._first_that_serves(args)
        backend = self._by_name.get(wanted)
        if wanted == "torch" or (
            backend is not None
            and backend.refusal(self.name, args, _selection.device_of(args)) is None
        ):
            return wanted
        raise BackendError(
            f"Backend '{wanted}' was asked for and cannot serve {self.name}. "
            f"{_selection.in_words(self.explain(*args))}. Ask for 'auto' or for a backend that can."
        )

    def _first_that_serves(self, args: tuple[Any, ...]) -> str:
        device = _selection.device_of(args)
        for name in _order.precedence(self.name, device):
            backend = self._by_name.get(name)
            if backend is not None and backend.refusal(self.name, args, device) is None:
                return name
        if device.type == "cuda":
            _selection.warn_of_fallback(self.name, self.explain(*args))
        return "torch"

    def run(self, name: str, *args: Any) -> Any:
        """Call one backend by name, without asking whether it can serve."""
        if name == "torch":
            return self.reference(*args)
        return self._by_name[name].run(*args)

    def _run(self, *args: Any) -> Any:
        *inputs, requested = args
        return self.run(self.choose(tuple(inputs), requested), *inputs)

    def _run_fake(self, *args: Any) -> Any:
        return self.fake(*args[:-1])
