"""Bridges: what stands in, at every cut, for the layers that were taken out.

A new bridge is a name in `names.py` and a function in `fit.py` that fits one tower.
"""
