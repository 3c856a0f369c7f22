"""`diagonal` and `lowrank`: modules at the cuts, begun in closed form and trained when healing.

Both start from the least squares of `fold`, with the student's state s itself as the features:
t - s = M' s for the teacher's state t. A diagonal bridge keeps the diagonal of M, fitted channel by
channel; a low-rank one the best M of rank R, which is M V V' with the first R eigenvectors V of
M' S M, the second moments of what M explains (S those of s).

Derivation: docs/math/bridges.md.
Source: reduced-rank regression, Izenman 1975, J. Multivariate Analysis 5.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace.models.bridges import DIAGONAL, INPUT, OUTPUT, attach, norm_arguments
from interlace.models.states import hooked
from interlace.ops import bridge_norm
from interlace.surgery.bridges.least_squares import NormalEquations, choose
from interlace.surgery.bridges.observe import observe
from interlace.surgery.bridges.structure import agree, first_calls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.records import Bridge
    from interlace.surgery.bridges.calibration import Calibration
    from interlace.surgery.bridges.gaps import Gap
    from interlace.surgery.bridges.observe import Pair
    from interlace.surgery.bridges.structure import Call

_MIN_DIMS = 2


def fit_run_time(pair: Pair, gaps: Sequence[Gap], *, kind: str, rank: int) -> list[Bridge]:
    """Build a module into the student at every gap of one tower, front to back.

    Each one is fitted on what the student computes with those before it in place.

    Args:
        pair: the models; the student is given the modules, whose parameters require gradients.
        gaps: the gaps of the tower, front to back.
        kind: "diagonal" or "lowrank".
        rank: R of a low-rank bridge, at least 1; at most the width is used.

    Returns:
        What was done at each gap.
    """
    made = []
    student = pair.student
    for gap in gaps:
        both = _equations(pair, gap)
        width = both[0].cross.shape[1]
        kept = None if kind == DIAGONAL else min(rank, width)
        solve = _diagonal if kept is None else partial(_low_rank, rank=kept)
        solution = choose(*both, solve=solve)
        if solution.change is None:
            note = "no change of the hidden states there came closer on held-out samples"
            made.append(gap.bridge(note=note))
            continue
        settings = {"ridge": solution.ridge, "width": width, "rank": kept}
        settings |= _place(student, gap, pair.calibration)
        dtype = next(student.get_submodule(gap.path).parameters()).dtype
        bridge = attach(student, settings, dtype).to(both[0].gram.device)
        _fill(bridge, solution.change)
        made.append(
            gap.bridge(
                kind,
                error_before=solution.before,
                error_after=solution.after,
                settings=settings,
            )
        )
    return made


def _equations(pair: Pair, gap: Gap) -> tuple[NormalEquations, NormalEquations]:
    """Stream the normal equations of t - s on s, of the samples to fit on and the held-out ones."""
    both: list[NormalEquations] = []
    for seen in observe(pair, gap):
        width, device = seen.state.shape[1], seen.state.device
        if not both:
            both = [NormalEquations(width, width, intercept=False, device=device) for _ in range(2)]
        missing = seen.goal.double() - seen.state.double()
        for equations, rows in zip(both, (~seen.held, seen.held), strict=True):
            equations.add(seen.state[rows], missing[rows], seen.weight[rows], seen.goal[rows])
    return both[0], both[1]


def _diagonal(equations: NormalEquations, ridge: float) -> torch.Tensor:
    own = equations.gram.diagonal()
    mean = float(own.mean())
    damped = own + (ridge * mean if mean > 0 else 1.0)
    made: torch.Tensor = torch.diag(equations.cross.diagonal() / damped)
    return made


def _low_rank(equations: NormalEquations, ridge: float, *, rank: int) -> torch.Tensor:
    change = equations.solve(ridge)
    explained = change.T @ equations.gram @ change
    # ascending eigenvalues
    _, vectors = torch.linalg.eigh((explained + explained.T) / 2)
    kept = vectors[:, -rank:]
    reduced: torch.Tensor = change @ kept @ kept.T
    return reduced


def _fill(bridge: Any, change: torch.Tensor) -> None:
    """Write M [D, D] into a bridge: as its scale, or split into its two factors."""
    with torch.no_grad():
        if bridge.scale is not None:
            bridge.scale.copy_(1.0 + change.diagonal())
            return
        left, sizes, right = torch.linalg.svd(change)
        rank = bridge.down.shape[0]
        # both factors equally large, so that they learn at one pace
        roots = sizes[:rank].sqrt()
        bridge.down.copy_((left[:, :rank] * roots).T)
        bridge.up.copy_(right[:rank].T * roots)


def _place(student: nn.Module, gap: Gap, calibration: Calibration) -> dict[str, Any]:
    """Say where the module goes: in front of the layer behind the gap, or at the tower's end."""
    if gap.ends and gap.position:
        module = f"{gap.path}.{gap.position - 1}"
        return {"module": module, "side": OUTPUT, "norm": None, "norm_kind": None}
    layer = student.get_submodule(f"{gap.path}.{gap.position}")
    called = first_calls([layer], calibration.probes, partial(calibration.run, student))
    norm, kind = (_first_norm(called[1][0]) if called else None) or (None, None)
    module = f"{gap.path}.{gap.position}"
    return {"module": module, "side": INPUT, "norm": norm, "norm_kind": kind}


def _first_norm(call: Call) -> tuple[str, str] | None:
    """Find the norm that a layer applies to its input, if `bridge_norm` can compute it.

    Returns:
        Its path in the layer and "layer" or "rms"; None where there is none.
    """
    read: list[tuple[str, nn.Module, torch.Tensor]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and args[0] is call.hidden and isinstance(output, torch.Tensor):
                read.append((name, module, output))

        return hook

    children = [(n, m) for n, m in call.layer.named_modules() if n and not list(m.children())]
    with hooked(module.register_forward_hook(note(name)) for name, module in children):
        call.repeat()
    for name, module, output in read:
        hidden = call.hidden
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        weight = getattr(module, "weight", None)
        if not isinstance(eps, float) or weight is None or weight.shape != hidden.shape[-1:]:
            continue
        kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        normed, _ = bridge_norm(hidden, None, **norm_arguments(module, kind, hidden.dtype))
        if hidden.dim() >= _MIN_DIMS and agree(normed, output):
            return name, kind
    return None
