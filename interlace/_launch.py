"""What a launcher such as torchrun says of the processes that it started."""

from __future__ import annotations

import os

from interlace.errors import ConfigError


def world_size() -> int:
    """Return the number of processes of the run, as its launcher says; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Tell whether this is the process that writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def check_single_process(what: str) -> None:
    """Refuse to do in several processes what only one may do, since they share a folder.

    Raises:
        ConfigError: a launcher started several processes.
    """
    if world_size() > 1:
        raise ConfigError(
            f"{what} runs in one process, and this is one of {world_size()} (WORLD_SIZE). Start it "
            "without torchrun; score and heal work in several."
        )
