"""Arguments that skinny_linear is tested with.

Letters: N rows of the weight, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from interlace.ops._draw import Draw
from interlace.ops._registry import OpSample


@dataclass(frozen=True)
class Form:
    """A problem in numbers, from which tensors are drawn.

    Attributes:
        name: what is special about it.
        leading: leading axes of x.
        n: N.
        k: K.
        gated: the weight is that of a gate and of an up projection.
        biased: with a bias.
        scale: magnitude of x, and of the weight.
        strided: x, weight and bias cut from larger tensors.
        turned: the weight as the transpose of [K, N].
        broken: a NaN and an infinity in the weight.
    """

    name: str
    leading: tuple[int, ...]
    n: int
    k: int
    gated: bool = False
    biased: bool = False
    scale: tuple[float, float] = (1.0, 1.0)
    strided: bool = False
    turned: bool = False
    broken: bool = False

    def draw(self, device: torch.device, dtype: torch.dtype) -> OpSample:
        """Draw the tensors."""
        normal = Draw(device, dtype).normal
        size, weight_size = self.scale
        if self.strided:
            x = normal(*self.leading, 3 * self.k, scale=size)[..., 1 : 2 * self.k : 2]
            weight = normal(self.n, self.k + 3, scale=weight_size)[:, 3:]
            bias = normal(self.n, 2)[:, 1]
        else:
            x = normal(*self.leading, self.k, scale=size)
            weight = normal(self.n, self.k, scale=weight_size)
            bias = normal(self.n)
        if self.turned:
            weight = weight.t().contiguous().t()
        if self.broken:
            weight[0, 1], weight[2, 0] = float("nan"), float("inf")
        return OpSample(self.name, (x, weight, bias if self.biased else None, self.gated))


_FORMS = (
    Form("row", (1, 1), 24, 2048, biased=True),
    Form("two_rows", (2, 1), 22, 1100),
    Form("three_rows", (3,), 9, 515, biased=True),
    Form("four_rows", (2, 2), 16, 3072),
    Form("many_rows", (3, 5), 10, 40, biased=True),
    Form("no_leading_axis", (), 5, 72),
    Form("even_in_half_steps", (1,), 6, 1536),
    Form("gated", (1,), 28, 2560, gated=True),
    Form("gated_odd", (3,), 2 * 7, 1027, gated=True, biased=True),
    Form("gated_four_rows", (4,), 2 * 9, 96, gated=True, biased=True),
    Form("gated_pair", (1,), 2, 33, gated=True),
    Form("one", (1,), 1, 1, biased=True),
    Form("one_column", (4,), 11, 1, biased=True),
    Form("one_output", (2,), 1, 1025),
    Form("strided", (2, 2), 13, 70, biased=True, strided=True),
    Form("strided_gated", (1,), 12, 1024, gated=True, biased=True, strided=True),
    Form("turned", (2,), 13, 70, turned=True),
    Form("no_row", (0,), 8, 16, biased=True),
    Form("no_output", (2,), 0, 16),
    Form("no_output_gated", (2,), 0, 16, gated=True, biased=True),
    Form("no_column", (2,), 6, 0, biased=True),
    Form("huge", (2,), 30, 300, scale=(60.0, 6.0)),
    Form("huge_gated", (2,), 30, 300, gated=True, scale=(3.0, 1.5)),
    Form("tiny", (2,), 30, 300, biased=True, scale=(1e-4, 1e-3)),
    Form("not_finite", (2,), 12, 300, biased=True, broken=True),
)


def samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """Numbers of rows, odd sizes, gates, biases, strides, nothing, one of each, magnitudes."""
    return [form.draw(device, dtype) for form in _FORMS]
