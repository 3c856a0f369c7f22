"""Times one case: readies all contenders, lets them take turns, and works out the figures."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config
from torch import Tensor

from interlace.microbenchmarks.gate import first_line
from interlace.microbenchmarks.timing import Contender, take_turns
from interlace.ops._check import outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from interlace.microbenchmarks.case import Case, Setup
    from interlace.microbenchmarks.ceilings import Ceilings
    from interlace.microbenchmarks.timing import Clock, Effort
    from interlace.ops._registry import Op

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Bench:
    """What all cases of a run share.

    Attributes:
        setup: device and dtype.
        clock: of the device.
        effort: how long to measure.
        ceilings: what the device can do in this dtype.
    """

    setup: Setup
    clock: Clock
    effort: Effort
    ceilings: Ceilings


def measure(op: Op, shape_name: str, case: Case, bench: Bench) -> Iterator[Record]:
    """Yield the record of the forward pass and, if the case asks for it, of the backward pass."""
    for direction in ("forward", "backward") if case.backward else ("forward",):
        # a graph whose buffers are given away serves one backward pass only
        kept = torch._functorch.config.patch(donated_buffer=False)
        with torch.set_grad_enabled(direction == "backward"), kept:
            ready = _Ready(op, case, direction)
            take_turns(ready.contenders, bench.clock, bench.effort)
            yield {
                "kind": "case",
                "op": op.name,
                "case": f"{shape_name}/{case.name}",
                "direction": direction,
                "dtype": str(bench.setup.dtype).removeprefix("torch."),
                **figures(ready, bench.ceilings),
                "left_out": ready.left_out,
                "load_average": [round(each, 2) for each in os.getloadavg()],
            }
            # cases may share tensors
            for leaf in ready.leaves:
                leaf.requires_grad_(False)
    # compiled code of one case must not count against the limit of recompilations of the next
    torch._dynamo.reset()


class _Ready:
    """All contenders of a case and direction that ran once, and why the others did not."""

    def __init__(self, op: Op, case: Case, direction: str) -> None:
        self.contenders: list[Contender] = []
        self.left_out: dict[str, str] = {}
        self.differences: dict[str, float | None] = {}
        self._truth: tuple[Tensor, ...] | None = None
        backward = op.backward if direction == "backward" else None
        self.leaves: list[Tensor] = []
        if backward:
            places = _places(op, backward.wrt)
            values = [case.args[place] for place in places]
            # an argument may be None, such as a gate that is not there
            self.leaves = [value.requires_grad_() for value in values if value is not None]
            faked = outputs(op.fake(*case.args))
            varied = (out for n, out in enumerate(faked) if n not in backward.constant)
            gradients = (*varied, *backward.kept(faked, case.args))
            self.num_bytes = backward.op.bytes_moved(*gradients)
            self.num_flops = backward.op.flops(*gradients)
            refusals = dict(backward.op.explain(*gradients))
        else:
            refusals = {}
            self.num_bytes, self.num_flops = op.bytes_moved(*case.args), op.flops(*case.args)
        # the reference comes first, because all others are compared with it
        for name, reason in reversed(op.explain(*case.args)):
            reason = case.left_out.get(name, reason) or refusals.get(name)
            self._ready(name, True, reason or partial(op, *case.args, backend=name))
        for name, baseline in case.baselines.items():
            self._ready(name, False, baseline)

    def _ready(self, name: str, is_backend: bool, call: Callable[[], Any] | str) -> None:
        if isinstance(call, str):
            self.left_out[name] = call
            return
        try:
            if self.leaves:
                call = self._gradient_of(call)
            result = outputs(call())
            difference = self._difference(result)
        # whatever a contender raises is the reason why it is left out
        except Exception as error:  # noqa: BLE001
            self.left_out[name] = f"raised {first_line(error)}"
            return
        self.differences[name] = difference
        self.contenders.append(Contender(name, is_backend, call))

    def _gradient_of(self, call: Callable[[], Any]) -> Callable[[], tuple[Tensor, ...]]:
        results = [each for each in outputs(call()) if each.requires_grad]
        if not results:
            raise ValueError("its outputs do not depend on the op's own tensors")
        generator = torch.Generator(results[0].device).manual_seed(1)
        gradients = [
            torch.randn(each.shape, generator=generator, device=each.device, dtype=each.dtype)
            for each in results
        ]
        gradient = partial(torch.autograd.grad, results, self.leaves, gradients, retain_graph=True)
        gradient()
        return gradient

    def _difference(self, result: tuple[Tensor, ...]) -> float | None:
        """Largest difference from the reference, as a fraction of its largest value."""
        if self._truth is None:
            self._truth = result
        found = [
            _apart(one, other)
            for one, other in zip(result, self._truth, strict=False)
            if isinstance(one, Tensor) and one.shape == other.shape and one.is_floating_point()
        ]
        return max(found, default=None)


def _places(op: Op, names: tuple[str, ...]) -> list[int]:
    code = op.reference.__code__
    parameters = code.co_varnames[: code.co_argcount]
    return [parameters.index(name) for name in names]


def _apart(one: Tensor, other: Tensor) -> float | None:
    if one.numel() == 0:
        return 0.0
    largest = float(other.detach().abs().max())
    apart = float((one.detach() - other.detach()).abs().max()) / (largest or 1.0)
    return apart if apart == apart and apart != float("inf") else None


def figures(ready: _Ready, ceilings: Ceilings) -> Record:
    """Work out rates and ratios; all of them follow from the medians.

    A ratio above 1 means faster than the fastest baseline, the plain PyTorch reference included.
    """
    others = [each for each in ready.contenders if not each.is_backend or each.name == "torch"]
    best = min(others, key=lambda each: each.median, default=None)
    rows = []
    for contender in sorted(ready.contenders, key=lambda each: each.median):
        median = contender.median
        gb_per_s, tflop_per_s = ready.num_bytes / median / 1e9, ready.num_flops / median / 1e12
        rows.append(
            {
                "name": contender.name,
                "is_backend": contender.is_backend,
                "median_ms": median * 1e3,
                "p20_ms": contender.quantile(0.2) * 1e3,
                "p80_ms": contender.quantile(0.8) * 1e3,
                "host_median_ms": statistics.median(contender.host_seconds) * 1e3,
                "entries": len(contender.seconds),
                "gb_per_s": gb_per_s,
                "percent_of_copy": 100 * gb_per_s / ceilings.copy_gb_per_s,
                "tflop_per_s": tflop_per_s,
                "percent_of_matmul": 100 * tflop_per_s / ceilings.matmul_tflop_per_s,
                "ratio_to_best_baseline": best.median / median if best else None,
                "largest_difference": ready.differences[contender.name],
            }
        )
    return {
        "bytes": ready.num_bytes,
        "flops": ready.num_flops,
        "best_baseline": best.name if best else None,
        "rows": rows,
    }
