"""Bridges: what stands in, at every cut, for the layers that were taken out.

A new bridge is a name in `names.py`, a file with a function that fits one tower and says what it
did at each gap, and its line in `fit.py`; its formulas go to docs/math/bridges.md. A student stays
a standard checkpoint where bridges only change weights, as `fold` and `scale` do.
"""
