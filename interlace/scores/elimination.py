"""In which order units of an output projection go if the rest makes up for each, and at what price.

Legend: C input columns of the projection, in U units of equal size; N tokens.

With X [N, C] what a projection W reads and M its outputs' metric, the error of leaving columns out

    E(left out) = min over W' without these columns of   tr (W - W')' M (W - W') X'X

is that of the least squares that the bridges `fold` and `refit` solve afterwards. Beginning with
all of them, the unit goes that adds least to it, one after the other (backward elimination). With
P = (X'X)^-1 and K = W' M W of what is left, a unit u adds tr(P_uu^-1 K_uu); when it has gone,

    P <- P - a a'              a = P_u L'^-1,  L L' = P_uu
    K <- K - b a' - a b'       b = K_u L'^-1 - a (L^-1 K_uu L'^-1) / 2

Source: Hassibi & Stork 1992, "Second order derivatives for network pruning: Optimal Brain
Surgeon"; whole columns, for all outputs at once, as in ZipLM (Kurtic et al. 2023, 2302.04089).
"""

from __future__ import annotations

import torch

# Of the mean square of a column, so that columns that say the same can be told apart.
_DAMPING = 1e-4
# Single columns go by so many, before the matrices are brought up to date at once.
_BLOCK = 64


def prices(squares: torch.Tensor, outputs: torch.Tensor, size: int = 1) -> torch.Tensor:
    """Return what every unit adds to the error at its turn, but no less than those before it.

    Args:
        squares: X'X, [C, C].
        outputs: W' M W, [C, C].
        size: columns of a unit.

    Returns:
        [U] fp64 on the device of `outputs`, in units of the error; the last one to go, which costs
        all that is left, included.
    """
    damped = squares.to(outputs.device, torch.float64, copy=True)
    damping = _DAMPING * damped.diagonal().mean()
    if not damping:
        # nothing was ever read
        return damped.new_zeros(len(damped) // size)
    damped.diagonal().add_(damping)
    # four such matrices at a time at most, one of them of torch itself
    factor = torch.linalg.cholesky(damped)
    del damped
    inverse = torch.cholesky_inverse(factor)
    del factor
    outputs = outputs.to(torch.float64, copy=True)
    found, order = _single(inverse, outputs) if size == 1 else _whole(inverse, outputs, size)
    # a unit can be cheaper once another one is gone; it goes after it all the same
    found[order] = found[order].cummax(0).values
    return found


def _single(inverse: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the units' own prices, [U], and their order; both matrices are overwritten."""
    count = len(inverse)
    found, order = inverse.new_zeros(count), []
    gone = torch.zeros(count, dtype=torch.bool, device=inverse.device)
    spread, weight = inverse.diagonal().clone(), outputs.diagonal().clone()
    for start in range(0, count, _BLOCK):
        width = min(_BLOCK, count - start)
        a, b = inverse.new_zeros(2, count, width)
        for step in range(width):
            price = (weight.clamp_min(0) / spread).masked_fill(gone, torch.inf)
            unit = int(price.argmin())
            found[unit] = price[unit]
            order.append(unit)
            gone[unit] = True
            # columns of both as they are by now
            own = inverse[:, unit] - a @ a[unit]
            of_outputs = outputs[:, unit] - b @ a[unit] - a @ b[unit]
            root = own[unit].sqrt()
            new = own / root
            change = of_outputs / root - new * (of_outputs[unit] / own[unit] / 2)
            a[:, step], b[:, step] = new, change
            spread = (spread - new.square()).masked_fill(gone, 1.0)
            weight = weight - 2 * new * change
        inverse.addmm_(a, a.T, alpha=-1)
        outputs.addmm_(b, a.T, alpha=-1).addmm_(a, b.T, alpha=-1)
    return found, torch.tensor(order, device=inverse.device)


def _whole(
    inverse: torch.Tensor, outputs: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same of units of several columns; both matrices are overwritten."""
    count = len(inverse) // size
    found, order = inverse.new_zeros(count), []
    left = list(range(count))
    while left:
        own, of_outputs = (_blocks(each, left, size) for each in (inverse, outputs))
        solved = torch.linalg.solve(own, of_outputs)
        price = solved.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0)
        best = int(price.argmin())
        unit = left.pop(best)
        found[unit] = price[best]
        order.append(unit)
        at = slice(unit * size, (unit + 1) * size)
        root = torch.linalg.cholesky(own[best])
        a = _divided(inverse[:, at], root)
        inner = torch.linalg.solve_triangular(root, _divided(of_outputs[best], root), upper=False)
        b = _divided(outputs[:, at], root) - a @ inner / 2
        inverse.addmm_(a, a.T, alpha=-1)
        outputs.addmm_(b, a.T, alpha=-1).addmm_(a, b.T, alpha=-1)
    return found, torch.tensor(order, device=inverse.device)


def _divided(value: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Return value L'^-1."""
    found: torch.Tensor = torch.linalg.solve_triangular(root.T, value, upper=True, left=False)
    return found


def _blocks(matrix: torch.Tensor, units: list[int], size: int) -> torch.Tensor:
    """Return the blocks on the diagonal that belong to units, [units, size, size]."""
    cuts = [slice(unit * size, (unit + 1) * size) for unit in units]
    return torch.stack([matrix[cut, cut] for cut in cuts])
