"""The methods that the retention benchmark compares: name -> how to make a student, how to heal it.

A new method is a function from a `Case` to a `Made`, in a file of its family, and its line in that
file's `METHODS`. All are given the same calibration samples, the same healing samples, batches and
steps.
"""

from __future__ import annotations

from methods import ablation, blocks, calibrated, distil, flap, ours, rules, sparse, width
from methods.case import Case, Made, Method, Shared, Sizes

__all__ = ["ABLATION", "COMPARED", "METHODS", "Case", "Made", "Method", "Shared", "Sizes"]

# what is compared with each other; the others are variants of our own method
COMPARED: dict[str, Method] = {
    **rules.METHODS,
    **ours.METHODS,
    **distil.METHODS,
    **blocks.METHODS,
    **width.METHODS,
    **flap.METHODS,
    **sparse.METHODS,
    **calibrated.METHODS,
}
ABLATION = (rules.OURS, *ablation.METHODS)
METHODS = COMPARED | ablation.METHODS
