"""Microbenchmarks of the ops: any op of the registry against what a user would run instead of it.

Timing an op `X`: write `cases/X.py` with one function,

    def cases(shape: ModelShape, setup: Setup) -> Iterator[Case]: ...

`case.py` says what a case holds, `shapes.py` which models there are, `cases/layer_similarity.py` is
an example. Nothing is registered by hand: `interlace bench X` finds the file by its name.

This folder is installed as `interlace.microbenchmarks`.
"""
