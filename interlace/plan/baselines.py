"""Selection rules of other work, so that everything is compared under one roof.

None of them says which layers to train. To heal all on an equal number of trained layers, each
tunes as many layers as it drops: the nearest kept neighbours (see `rules.nearest_kept`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from interlace.plan.rules import Choice, by_score, finish

if TYPE_CHECKING:
    from interlace.plan.rules import Problem


def shortgpt(problem: Problem) -> Choice:
    """Drop the n layers with the smallest block influence BI = 1 - s_1, ties to the lower index.

    The last layer takes part where its similarity was recorded (the tail of pack 1).

    Source: ShortGPT (arXiv 2403.03853), equation 1.

    Raises:
        PlanError: pack 1 was not scored, or too few layers have a score.
    """
    scores = problem.scored(with_tail=True)
    ranked = [layer for layer in by_score(scores.items()) if layer not in problem.protected]
    drop = ranked[: problem.num_drop]
    if len(drop) < problem.num_drop:
        raise problem.shortage(len(drop), "layers with a score")
    table = tuple(scores.get(layer) for layer in range(problem.num_layers))
    if problem.weighted is not None:
        reasons = {layer: f"score {scores[layer]:.4f}" for layer in drop}
    else:
        reasons = {layer: f"block influence {1 - scores[layer]:.4f}" for layer in drop}
    return finish(problem, drop, reasons, table)


def uidl(problem: Problem) -> Choice:
    """Drop the block of n layers with the smallest angular distance arccos(s_n) / pi.

    Here the mean cosine over all tokens stands under the arc cosine; the original averages the
    angle of each sequence's last token. The block at the end takes part where its similarity was
    recorded (the tail of pack n). Ties go to the lower start. Blocks with a protected layer are
    left out. The scores shown are cosines of the block that starts at a layer.

    Source: "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), section 3.2.

    Raises:
        PlanError: pack n was not scored, or every block holds a protected layer.
    """
    count = problem.num_drop
    blocks = dict(enumerate(problem.packs(count)))
    tail = problem.scores.end(count, problem.group)
    if tail is not None:
        blocks[problem.num_layers - count] = tail
    # Rounding may carry a cosine a little past 1, where there is no angle.
    angles = {i: math.acos(max(-1.0, min(1.0, cosine))) / math.pi for i, cosine in blocks.items()}
    free = [
        start
        for start in angles
        if all(layer not in problem.protected for layer in range(start, start + count))
    ]
    if not free:
        raise problem.shortage(0, f"blocks of {count} neighbouring layers")
    start = min(free, key=lambda each: (angles[each], each))
    drop = list(range(start, start + count))
    why = f"block {start}..{start + count - 1} at angular distance {angles[start]:.4f}"
    table = tuple(blocks.get(layer) for layer in range(problem.num_layers))
    return finish(problem, drop, dict.fromkeys(drop, why), table)


def last(problem: Problem) -> Choice:
    """Drop the last n layers, from the end backwards, and tune the last ones that stay.

    Source: "Reassessing Layer Pruning in LLMs" (arXiv 2411.15558), reverse order.
    """
    drop = problem.candidates[::-1][: problem.num_drop]
    kept = [layer for layer in range(problem.num_layers) if layer not in drop]
    tune = tuple(kept[::-1][: problem.num_drop])
    reasons = dict.fromkeys(drop, "among the last layers")
    reasons |= dict.fromkeys(tune, "among the last layers that stay")
    return Choice(tuple(drop), tune, reasons=reasons)


def uniform(problem: Problem) -> Choice:
    """Drop n layers at even distances.

    Of the m layers that may be dropped, the n in the middle of n equal parts: the ones numbered
    floor((k + 1/2) m / n), k = 0..n-1.
    """
    free, count = problem.candidates, problem.num_drop
    drop = [free[(2 * k + 1) * len(free) // (2 * count)] for k in range(count)]
    return finish(problem, drop, dict.fromkeys(drop, "at even distances"))
