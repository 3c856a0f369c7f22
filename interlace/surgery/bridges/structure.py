"""How a layer writes into the residual stream, found out by trying and not by its names.

A layer is called again with the arguments of a real call while outputs of its linear modules are
changed, and what it gives is compared. So a wrong guess about a family cannot pass: what does not
behave as a bridge needs it is refused.

Legend: B batch, T tokens, D width, F features of the feed-forward part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace._torch_utils import rounding_tolerance
from interlace.models.discovery import routes
from interlace.models.states import hooked, layer_input, layer_output, shift_input
from interlace.surgery.bridges.observe import check_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager


def agree(found: torch.Tensor, expected: torch.Tensor, beside: torch.Tensor | None = None) -> bool:
    """Tell whether two tensors are equal up to the rounding of their dtype.

    Args:
        found: a tensor.
        expected: what it should be.
        beside: what both were added to and taken from again, value by value, rounded each time:
            single channels of a residual stream may be a thousand times as large as the others.
    """
    if found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    allowed = rounding_tolerance(found.dtype) * expected.double().abs().max()
    if beside is not None:
        allowed = allowed + 4 * torch.finfo(beside.dtype).eps * beside.double().abs()
    # written so that NaN fails
    return bool(((found.double() - expected.double()).abs() <= allowed).all())


@dataclass(frozen=True)
class Call:
    """A layer with the arguments of one call of it."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states that it is given."""
        return layer_input(self.args, self.kwargs, type(self.layer).__name__)

    def repeat(self) -> torch.Tensor:
        """Call the layer again and return the hidden states it gives."""
        return layer_output(self.layer(*self.args, **self.kwargs), type(self.layer).__name__)


def record_calls(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[Call]:
    """Run a model and keep the first call of each of some layers.

    Args:
        layers: the layers.
        run: runs the model on a batch that reaches them.

    Raises:
        DataError: what a layer is given is not finite.
    """
    calls: dict[int, Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in calls:
            # a tensor may be worked on in place later; anything else is as good as constant
            calls[id(module)] = Call(
                module,
                tuple(each.clone() if isinstance(each, torch.Tensor) else each for each in args),
                {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()},
            )

    with hooked(layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers):
        run()
    found = [calls[id(layer)] for layer in layers if id(layer) in calls]
    for call in found:
        check_finite([call.hidden], f"reach a {type(call.layer).__name__} beside a cut")
    return found


def first_calls(
    layers: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Any],
) -> tuple[Mapping[str, Any], list[Call]] | None:
    """Return the first batch that reaches all of some layers, and their calls; None without one.

    Args:
        layers: the layers.
        batches: to try in turn.
        run: runs the model on a batch.
    """
    for batch in batches:
        calls = record_calls(layers, partial(run, batch))
        if len(calls) == len(layers):
            return batch, calls
    return None


def changing(
    changes: Mapping[nn.Module, Callable[[torch.Tensor], torch.Tensor]],
) -> AbstractContextManager[None]:
    """Replace what some modules give by a function of it, for a block."""
    return hooked(
        module.register_forward_hook(lambda _, __, output, change=change: change(output))
        for module, change in changes.items()
    )


@dataclass(frozen=True)
class Norm:
    """A norm as a function: gamma (z - mean z) / sigma + beta, where an RMSNorm has no mean.

    Attributes:
        module: the norm.
        gamma: what its weight multiplies by, [D] fp64.
        centred: it is a LayerNorm.
        eps: added to the square of sigma.
    """

    module: nn.Module
    gamma: torch.Tensor
    centred: bool
    eps: float

    def sigma(self, given: torch.Tensor) -> torch.Tensor:
        """Return what every row of its input [N, D] is divided by, [N] fp64."""
        rows = given.double()
        square = rows.var(1, correction=0) if self.centred else rows.square().mean(1)
        return (square + self.eps).sqrt()


def _known(module: Any, given: torch.Tensor, made: torch.Tensor) -> Norm | None:
    """Describe a norm, checked against its own output; None where it is of another kind."""
    weight = module.weight.detach().double()
    if isinstance(module, nn.LayerNorm):
        return Norm(module, weight, True, module.eps)
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # Gemma's weight is what is added to 1
    for gamma in (weight, 1 + weight) if isinstance(eps, float) else ():
        norm = Norm(module, gamma, False, eps)
        rows = given.reshape(-1, given.shape[-1])
        expected = gamma * rows.double() / norm.sigma(rows)[:, None]
        if agree(made, expected.view(made.shape).to(made.dtype)):
            return norm
    return None


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.LayerNorm):
        return module.elementwise_affine
    return "RMSNorm" in type(module).__name__ and isinstance(
        getattr(module, "weight", None), nn.Parameter
    )


@dataclass
class _Trace:
    """Outputs (or, for norms, inputs and outputs) of the modules that one call ran, in order.

    Of linear modules in front of experts there are none: what they give is no longer to be told
    from what the experts make of it.
    """

    linears: dict[nn.Module, torch.Tensor]
    norms: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]
    output: torch.Tensor


def _trace(call: Call) -> _Trace:
    made = _Trace({}, {}, torch.empty(0))
    experts = {module.experts for module in call.layer.modules() if routes(module)}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in experts:
            made.linears.clear()
        elif isinstance(module, nn.Linear):
            # without columns: of a part that was taken out
            if not module.in_features or not module.out_features:
                return
            made.linears.pop(module, None)
            made.linears[module] = output
        else:
            made.norms[module] = (args[0], output)

    traced = [
        module
        for module in call.layer.modules()
        if isinstance(module, nn.Linear) or _is_norm(module) or module in experts
    ]
    with hooked(module.register_forward_hook(hook) for module in traced):
        made.output = call.repeat()
    return made


@dataclass(frozen=True)
class Projection:
    """The last linear module of a layer, whose output is added to the residual stream.

    Attributes:
        linear: the module, [F] -> [D].
        scale: by which every channel of its output is multiplied before it is added [D] fp64, as
            LayerScale does; None where it is added as it is.
        norms: the norms behind it: those that the sum with the residual passes in turn, in
            post-norm layers (one, or more where parts between them were taken out); the one that
            its output passes before it is added, where a layer has norms in front of and behind
            its parts; else none.
        sandwiched: the last of these.
    """

    linear: nn.Linear
    scale: torch.Tensor | None = None
    norms: tuple[Norm, ...] = ()
    sandwiched: bool = False


def find_projection(call: Call) -> Projection | None:
    """Find the module that a change of the layer's output can be folded into.

    That is the last linear module the layer runs, if whatever is added to its output is added to
    the layer's output as well (pre-norm), as it is or with a constant factor per channel, or to the
    input of the first of the norms that give it, one out of the other (post-norm); or if what a
    norm makes of its output is added to the layer's output. A gate behind it is none of these.

    Returns:
        The module; None where the layer has none of that kind.
    """
    plain = _trace(call)
    rows = plain.output.numel() // plain.output.shape[-1]
    last = next(reversed(plain.linears), None)
    if last is None or plain.linears[last].numel() != rows * plain.output.shape[-1]:
        return None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, plain.output.shape[-1], generator=generator)
    added = noise.to(plain.output) * plain.output.std()

    def add(output: torch.Tensor) -> torch.Tensor:
        return output + added.view_as(output)

    with changing({last: add}):
        moved = _trace(call)
    linear: Any = last
    given = (moved.output - plain.output).reshape(added.shape)
    beside = plain.output.reshape(added.shape)
    if agree(given, added, beside):
        return Projection(linear)
    scale = (given.double() * added.double()).sum(0) / added.double().square().sum(0)
    if agree(given, (scale * added).to(given.dtype), beside):
        return Projection(linear, scale)
    for norm, (entered, made) in plain.norms.items():
        chain = _chain(plain, norm)
        if chain and agree(moved.norms[norm][0] - entered, added.view_as(entered), entered):
            return Projection(linear, norms=chain)
        if torch.equal(entered, plain.linears[last]):
            known = _known(norm, entered, made)
            added_by = moved.norms[norm][1] - made
            if known and agree(moved.output - plain.output, added_by, plain.output):
                return Projection(linear, norms=(known,), sandwiched=True)
    return None


def _chain(trace: _Trace, norm: nn.Module) -> tuple[Norm, ...]:
    """Return the norms from one to the layer's output, each given what the last one made."""
    found: list[nn.Module] = []
    following: nn.Module | None = norm
    while following is not None:
        found.append(following)
        made = trace.norms[following][1]
        if made.shape == trace.output.shape and torch.equal(made, trace.output):
            known = [_known(each, *trace.norms[each]) for each in found]
            return tuple(each for each in known if each) if all(known) else ()
        following = next(
            (
                each
                for each, (given, _) in trace.norms.items()
                if each not in found and given.shape == made.shape and torch.equal(given, made)
            ),
            None,
        )
    return ()


def find_writers(call: Call) -> list[nn.Linear] | None:
    """Find the linear modules of a layer whose outputs are added to the residual stream.

    Without their outputs the layer hands its input on unchanged, and it needs every one of them
    back to be itself.

    Returns:
        The modules, in the order they run; None where the layer changes its input in another way
        too (a norm on the stream itself, a learned scale of the residual).
    """
    linears = list(_trace(call).linears)
    silent = dict.fromkeys(linears, torch.zeros_like)

    def hands_on() -> bool:
        with changing(silent):
            return agree(call.repeat(), call.hidden)

    if not hands_on():
        return None
    # in order, so that what feeds a writer is judged while the writer is still silent
    for linear in linears:
        del silent[linear]
        if not hands_on():
            silent[linear] = torch.zeros_like
    found: Any = list(silent)
    return list(found)


def read_elsewhere(layer: nn.Module, behind: nn.Module, run: Any) -> bool:
    """Tell whether anything but the next layer reads what a layer gives.

    The layer's output is moved and the next layer's input moved back; the predictions stay if
    nobody else looked.

    Args:
        layer: the layer whose output is in question.
        behind: the layer that runs after it.
        run: runs the model on a batch and gives its output.
    """
    kept: dict[str, torch.Tensor] = {}

    def away(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = layer_output(output, type(layer).__name__)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(hidden.shape, generator=generator).to(hidden)
        kept["plain"], kept["moved"] = hidden, hidden + noise * hidden.std()
        return (kept["moved"], *output[1:]) if isinstance(output, tuple) else kept["moved"]

    def back(hidden: torch.Tensor) -> torch.Tensor:
        # to the last bit, unless something was added in between
        added = hidden.double() - kept["moved"].double()
        return (kept["plain"].double() + added).to(hidden.dtype)

    expected = predictions(run())
    # before the hooks by which transformers collects hidden states for others to read
    with hooked((layer.register_forward_hook(away, prepend=True), shift_input(behind, back))):
        found = predictions(run())
    return not all(map(agree, found, expected))


def predictions(output: Any) -> list[torch.Tensor]:
    """Return the floating tensors at the top of a model's output: logits, embeddings, losses."""
    values = output.values() if isinstance(output, dict) else output
    return [each for each in values if isinstance(each, torch.Tensor) and each.is_floating_point()]
