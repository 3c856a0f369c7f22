"""Projections of one input merged into one matrix, without a second copy of the weights.

The rows of all weights lie one after the other, and the parameters of the single projections become
views of their part. So they keep their names, optimizers keep their objects, and what is loaded
into them or trained is what the merged matrix holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interlace.nn.stepping import project
from interlace.nn.swap import hooked

if TYPE_CHECKING:
    from collections.abc import Sequence


class Merged:
    """The projections of a module that share their input.

    Attributes:
        weight: [sum of outputs, inputs].
        bias: [sum of outputs], or None.
        sizes: outputs of every projection.
    """

    def __init__(self, projections: Sequence[nn.Linear]) -> None:
        """Lay the weights out; `why_not` has no objection.

        Args:
            projections: in the order of the output.
        """
        self._projections = tuple(projections)
        self.sizes = [each.out_features for each in projections]
        self.lay_out()

    def __reduce__(self) -> tuple[Any, ...]:
        """Merge the projections of a copied module anew, since copied parameters are no views."""
        return Merged, (self._projections,)

    @staticmethod
    def why_not(projections: Sequence[nn.Module]) -> str | None:
        """Say why projections cannot be merged; None if they can."""
        first = projections[0]
        for each in projections:
            if type(each) is not nn.Linear or type(first) is not nn.Linear:
                return f"a projection is a {type(each).__name__}, not a plain nn.Linear"
            weight = each.weight
            if type(weight) is not nn.Parameter:
                # quantised in place, as torchao does
                return f"a weight is a {type(weight).__name__}, not a plain tensor"
            if (weight.dtype, weight.device) != (first.weight.dtype, first.weight.device):
                return "the weights differ in dtype or device"
            if (each.bias is None) != (first.bias is None):
                return "some projections have a bias and some have none"
            if not weight.is_floating_point():
                return f"the weights are {weight.dtype}"
        return None

    @torch.no_grad()
    def lay_out(self) -> None:
        """Move the weights side by side, where they do not lie so already."""
        if not self._is_side_by_side():
            self._join()
        self._laid = [(each.weight, each.bias) for each in self._projections]
        self._addresses = [_addresses(*each) for each in self._laid]

    def _is_side_by_side(self) -> bool:
        """Tell whether all parameters are their parts of the merged ones, wherever these went.

        Memory that is moved as a whole takes all of its views along, as when processes share it.
        """
        if not hasattr(self, "weight"):
            return False
        names = ("weight",) if self.bias is None else ("weight", "bias")
        pairs = [
            (getattr(each, name), part)
            for name in names
            for each, part in zip(
                self._projections, torch.split(getattr(self, name), self.sizes), strict=True
            )
        ]
        return all(_place(parameter) == _place(part) for parameter, part in pairs)

    def _join(self) -> None:
        weights: list[Tensor] = [each.weight for each in self._projections]
        biases: list[Tensor] = [each.bias for each in self._projections if each.bias is not None]
        # memory may run out here, so nothing is moved before
        self.weight = torch.cat([each.detach() for each in weights])
        self.bias = torch.cat([each.detach() for each in biases]) if biases else None
        for joined, parameters in ((self.weight, weights), (self.bias, biases)):
            if joined is not None:
                parts = torch.split(joined, self.sizes)
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.data = part

    @torch.no_grad()
    def separate(self) -> None:
        """Give every projection memory of its own again."""
        for each in self._projections:
            for parameter in (each.weight, each.bias):
                if parameter is not None:
                    parameter.data = parameter.detach().clone()

    def serves(self, projections: Sequence[nn.Module]) -> bool:
        """Tell whether one product with the merged matrix may stand for the single ones.

        Not where a weight is to get a gradient, which belongs to the single parameter; where a
        projection was replaced or is listened to; or where its weights or biases were put
        elsewhere.

        Args:
            projections: as the module holds them now.
        """
        if torch.is_grad_enabled() and any(
            each.weight.requires_grad or (each.bias is not None and each.bias.requires_grad)
            for each in self._projections
        ):
            return False
        for now, own, (weight, bias) in zip(
            projections, self._projections, self._laid, strict=True
        ):
            if now is not own or now.weight is not weight or now.bias is not bias or hooked(now):
                return False
        laid_out: bool = self._is_laid_out()
        return laid_out

    # A compiler knows no addresses, so it asks once, while it compiles. Where a module or a
    # parameter becomes another one, it compiles anew.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _is_laid_out(self) -> bool:
        """Tell whether weights and biases lie where they were put."""
        return self._addresses == [_addresses(*each) for each in self._laid]

    def __call__(self, x: Tensor) -> Tensor:
        """Project: [..., inputs] -> [..., sum of outputs]."""
        return project(x, self.weight, self.bias)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.dtype, tensor.shape, tensor.data_ptr()


def _addresses(weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Where a weight and a bias lie; 0 for no bias."""
    return weight.data_ptr(), 0 if bias is None else bias.data_ptr()
