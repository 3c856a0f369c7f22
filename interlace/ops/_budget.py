"""The error budget: how far an implementation may be from the truth.

The truth is the reference in fp64 on the inputs as they are, already rounded to their dtype. The
reference in that dtype has an error of its own, and an implementation may have twice that error and
a few units in the last place (ULP), both in its largest and in its root-mean-square error. So the
bound follows the problem (its size, its magnitude, its dtype) and nobody picks a tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_FACTOR = 2.0


@dataclass(frozen=True)
class Budget:
    """What an op allows beyond twice the reference's own error.

    Attributes:
        ulps: units in the last place of the output's dtype, at the output's largest magnitude. A
            sum in another order is off by a few of them where the reference's happens to be exact.
    """

    ulps: float = 4.0

    def excess(self, actual: Tensor, reference: Tensor, truth: Tensor) -> str | None:
        """Say how an output breaks the budget; None if it keeps it.

        Args:
            actual: the implementation's output, any shape and dtype.
            reference: the reference's output on the same inputs in the same dtype.
            truth: the reference's output on the same inputs in fp64.
        """
        if actual.shape != truth.shape or actual.dtype != reference.dtype:
            return (
                f"got {actual.dtype} {tuple(actual.shape)}, "
                f"expected {reference.dtype} {tuple(truth.shape)}"
            )
        if not actual.dtype.is_floating_point:
            wrong = int((actual != reference).sum())
            return f"{wrong} of {actual.numel()} whole numbers differ" if wrong else None
        got, plain, exact = (
            tensor.detach().cpu().double() for tensor in (actual, reference, truth)
        )
        if not torch.equal(_finiteness(got), _finiteness(exact)):
            where = int((_finiteness(got) != _finiteness(exact)).flatten().int().argmax())
            return f"NaN or infinity in the wrong place, first at flat index {where}"
        finite = exact.isfinite()
        return self._excess(got[finite], plain[finite].nan_to_num(), exact[finite], actual.dtype)

    def _excess(self, got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> str | None:
        if got.numel() == 0:
            return None
        ulp = torch.finfo(dtype).eps * float(exact.abs().max())
        error, own = (got - exact).abs(), (plain - exact).abs()
        for name, measure in (("largest", _largest), ("root-mean-square", _rms)):
            allowed = _FACTOR * measure(own) + self.ulps * ulp
            if measure(error) > allowed:
                worst = int(error.argmax())
                return (
                    f"{name} error {measure(error):.3e} exceeds {allowed:.3e} (reference's own "
                    f"{measure(own):.3e}, ULP {ulp:.3e}); worst at flat index {worst}: got "
                    f"{float(got[worst]):.9g}, truth {float(exact[worst]):.9g}"
                )
        return None


def _finiteness(values: Tensor) -> Tensor:
    # 0 finite, 1 NaN, 2 +inf, 3 -inf
    return values.isnan().int() + 2 * values.isposinf().int() + 3 * values.isneginf().int()


def _largest(errors: Tensor) -> float:
    return float(errors.max())


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())
