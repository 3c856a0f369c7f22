"""One file per op, named after it, each with one function `cases(shape, setup)`."""
