"""What a cases file hands over: arguments of an op, and what else a user could run on them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """One set of arguments that an op is timed on, beside its baselines.

    A cases file yields cases one by one, and a case is dropped when the next is there, so two of
    them have to fit in memory. Yield the cases that matter most first: where the time is limited,
    the last ones are left out (and listed as such).

    Attributes:
        name: the regime, such as "full-t4096"; the runner puts the name of the model shape in
            front.
        args: the op's arguments, as its reference takes them, on the device of the setup.
        baselines: name -> what a user would run instead, without arguments; or a sentence that
            says why it cannot run here, and is listed with the results. A baseline returns what
            the op returns, as closely as it can: how far apart they are is recorded. Whatever can
            be made ready beforehand (layouts, index tensors, masks) is made outside the callable,
            so that nothing slows a baseline down but its own work. A baseline that raises is
            listed with what it raised.
        backward: time the gradient too, by torch.autograd.grad alone. The tensors that the op's
            `Backward.wrt` names are then made to require a gradient, so baselines have to compute
            from these very tensors of `args`, their views made within the callable.
            Plain PyTorch under autograd belongs among them; the reference has its own backward.
        left_out: backend -> why it is not timed here, for a reference that would need 30 GB, say.
    """

    name: str
    args: tuple[Any, ...]
    baselines: Mapping[str, Callable[[], Any] | str] = field(default_factory=dict)
    backward: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Setup:
    """Where and in what precision cases are made.

    Attributes:
        device: where the op runs.
        dtype: floating-point type of the inputs: bf16 on a GPU, fp32 on the CPU, unless asked
            otherwise.
        quick: yield few and small cases.
        generator: seeded, on the device; a new one for every op and model shape.
    """

    device: torch.device
    dtype: torch.dtype
    quick: bool
    generator: torch.Generator

    @classmethod
    def seeded(
        cls, device: torch.device, dtype: torch.dtype, *, quick: bool = False, seed: int = 0
    ) -> Setup:
        """Make a setup with a generator of its own."""
        return cls(device, dtype, quick, torch.Generator(device).manual_seed(seed))

    @property
    def is_cuda(self) -> bool:
        """Whether the op runs on a GPU."""
        return self.device.type == "cuda"

    def randn(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw normal numbers; zeros or small integers would flatter kernels."""
        return torch.randn(
            *size, generator=self.generator, device=self.device, dtype=dtype or self.dtype
        )

    def rand(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw uniform numbers in 0..1."""
        return torch.rand(
            *size, generator=self.generator, device=self.device, dtype=dtype or self.dtype
        )

    def whole(self, values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        """Put whole numbers, such as prefix sums of lengths, on the device."""
        return torch.tensor(values, dtype=dtype, device=self.device)


def compiled(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    """Make a baseline of torch.compile, for shapes as they are; it compiles when first called.

    Args:
        function: plain PyTorch, without graph breaks.
        args: what it is called with.
        options: of torch.compile, such as mode="max-autotune-no-cudagraphs".
    """
    # fullgraph: beyond the limit of recompilations torch raises instead of running eagerly
    made = torch.compile(function, fullgraph=True, dynamic=False, **options)
    return lambda: made(*args)


def installed(module: str) -> str | None:
    """Say that a library of other people's kernels is missing; None if it is there."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed"
