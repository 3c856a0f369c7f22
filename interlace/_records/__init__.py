"""The parts that `interlace.records` gathers under its name."""
