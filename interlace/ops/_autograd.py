"""Gradients of ops: the backward of an op is an op of its own, joined to it here.

The autograd.Function stands outside the dispatcher. That costs about a third of
torch.library.register_autograd per call and compiles with fullgraph=True.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from interlace.ops._registry import Op


@dataclass(frozen=True, eq=False)
class Backward:
    """How the gradients of an op are computed.

    Attributes:
        op: takes the gradient of every output of the forward op that has one, then all outputs if
            `needs_outputs`, then the forward op's arguments; returns one gradient per name in
            `wrt` that is not in `same`, of any shape for an argument that is None.
        wrt: arguments of the forward op that receive a gradient; each is a tensor or None, not a
            list.
        needs_outputs: the forward op's outputs are kept for `op`.
        constant: places of outputs that carry no gradient, such as statistics kept for `op`.
        keep: (outputs, arguments) -> what is kept for `op` and follows the gradients there, for an
            op that would hold memory for nothing by keeping all of them.
        same: argument -> another argument whose gradient is its gradient too, as for two terms of
            a sum.
    """

    op: Op
    wrt: tuple[str, ...]
    needs_outputs: bool = False
    constant: tuple[int, ...] = ()
    keep: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]] | None = None
    same: Mapping[str, str] = field(default_factory=dict)

    def kept(self, outputs: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `op` takes after the gradients, from outputs and arguments of the forward op."""
        if self.keep is not None:
            return self.keep(outputs, args)
        return (*outputs, *args) if self.needs_outputs else args


def differentiable(
    forward_call: Callable[..., Any],
    parameters: tuple[str, ...],
    num_outputs: int,
    backward: Backward,
) -> Callable[..., Any]:
    """Join a forward op to its backward.

    Args:
        forward_call: the forward op: its arguments, then the name of a backend.
        parameters: names of the arguments, without the backend.
        num_outputs: of the forward op.
        backward: the backward op and what it needs.

    Returns:
        A function with the arguments of `forward_call` whose result carries gradients.
    """
    count = len(parameters)
    # as truth values: torch.compile may turn numbers that differ from op to op into unknowns
    varies = tuple(place not in backward.constant for place in range(num_outputs))
    own = tuple(name for name in backward.wrt if name not in backward.same)

    class Joined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = forward_call(*args)
            found = outputs if isinstance(outputs, tuple) else (outputs,)
            if not all(varies):
                ctx.mark_non_differentiable(
                    *(output for output, varied in zip(found, varies, strict=True) if not varied)
                )
            kept = backward.kept(found, args[:count])
            # only tensors may be saved; the rest keeps its place
            ctx.save_for_backward(*(value for value in kept if isinstance(value, Tensor)))
            ctx.others = tuple(None if isinstance(value, Tensor) else (value,) for value in kept)
            ctx.backend = args[count]
            return outputs

        @staticmethod
        # the op of the backward has none of its own
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            saved = iter(ctx.saved_tensors)
            kept = [next(saved) if other is None else other[0] for other in ctx.others]
            given = [g for g, varied in zip(gradients, varies, strict=True) if varied]
            found = backward.op(*given, *kept, backend=ctx.backend)
            found = found if isinstance(found, tuple) else (found,)
            by_name = dict(zip(own, found, strict=True))
            results: list[Tensor | None] = [None] * (count + 1)
            for name in backward.wrt:
                place = parameters.index(name)
                # an argument that is None needs none
                if ctx.needs_input_grad[place]:
                    results[place] = by_name[backward.same.get(name, name)]
            return tuple(results)

    joined_call: Callable[..., Any] = Joined.apply

    def call(*args: Any) -> Any:
        # an autograd.Function costs as much as a small op, for nothing where no gradient is asked
        if torch.is_grad_enabled() and any(_wants_gradient(arg) for arg in args):
            return joined_call(*args)
        return forward_call(*args)

    return call


def _wants_gradient(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.requires_grad
