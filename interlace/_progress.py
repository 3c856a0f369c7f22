"""One way to show progress: a bar with the time left on a terminal, a log line elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.progress import Progress

T = TypeVar("T")

logger = logging.getLogger("interlace.progress")

LOG_SECONDS = 10.0


class _Display:
    """What is being shown at the moment: nested bars share one live display."""

    hidden: int = 0
    live: Progress | None = None


class Advance(Protocol):
    """Called by the one who works: `advance()` after each item, with an optional note."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Move on by `steps` items and show `note` (such as "loss 1.23") behind the bar."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show and log no progress inside the block."""
    _Display.hidden += 1
    try:
        yield
    finally:
        _Display.hidden -= 1


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


@contextlib.contextmanager
def _bar_on_terminal(description: str, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    outermost = _Display.live is None
    if _Display.live is None:
        _Display.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        _Display.live.start()
    live = _Display.live
    task = live.add_task(description, total=total, note="")

    def advance(steps: int = 1, note: str = "") -> None:
        if note:
            live.update(task, advance=steps, note=note)
        else:
            live.advance(task, steps)

    try:
        yield advance
    finally:
        if outermost:
            live.stop()
            _Display.live = None
        else:
            live.remove_task(task)


@contextlib.contextmanager
def _lines_in_log(description: str, total: int | None) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last < LOG_SECONDS:
            return
        last = now
        tail = f", {note}" if note else ""
        if total and done:
            left = (now - start) / done * max(0, total - done)
            logger.info("%s: %d/%d, %s left%s", description, done, total, _clock(left), tail)
        else:
            logger.info("%s: %d%s", description, done, tail)

    yield advance
    logger.info("%s: %d done in %s", description, done, _clock(time.monotonic() - start))


def _no_advance(steps: int = 1, note: str = "") -> None:
    return None


@contextlib.contextmanager
def bar(description: str, total: int | None = None) -> Iterator[Advance]:
    """Show progress of work that is not a plain loop.

    Args:
        description: what is being done, such as "scoring".
        total: number of items, where it is known.

    Yields:
        A function to call after every item.
    """
    if _Display.hidden:
        yield _no_advance
        return
    shown = _bar_on_terminal if sys.stderr.isatty() else _lines_in_log
    with shown(description, total) as advance:
        yield advance


def track(iterable: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with progress and the estimated time left.

    Args:
        iterable: the items.
        description: what is being done, such as "scoring".
        total: number of items; taken from `len(iterable)` where that exists.

    Yields:
        The items.
    """
    if total is None:
        try:
            total = len(iterable)  # type: ignore[arg-type]
        except TypeError:
            total = None
    with bar(description, total) as advance:
        for item in iterable:
            yield item
            advance()
