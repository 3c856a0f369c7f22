"""Tables as plain text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# narrower than this, a wrapped column is harder to read than lines that are too long
_NARROWEST = 20


def plain_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, width: int | None = None
) -> str:
    """Lay out rows under a header, columns aligned by two spaces.

    Args:
        header: one title per column.
        rows: cells; numbers are set flush right.
        width: characters of a line, kept by wrapping the last column; None for any number.

    Returns:
        The table, without a trailing newline.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if width is not None:
        cells = _wrapped(header, cells, width)
    widths = [
        max(len(title), *(len(row[column]) for row in cells)) if cells else len(title)
        for column, title in enumerate(header)
    ]
    right = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        for column in range(len(header))
    ]

    def line(parts: Sequence[str]) -> str:
        set_out = [
            part.rjust(width) if flush else part.ljust(width)
            for part, width, flush in zip(parts, widths, right, strict=True)
        ]
        return "  ".join(set_out).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def _wrapped(header: Sequence[str], cells: list[list[str]], width: int) -> list[list[str]]:
    """Break the last cell of rows into lines of their own, the other cells empty beside them."""
    taken = sum(
        max(len(each) for each in (title, *(row[column] for row in cells))) + 2
        for column, title in enumerate(header[:-1])
    )
    room = max(_NARROWEST, width - taken)
    lines = []
    for row in cells:
        first, *others = textwrap.wrap(row[-1], room) or [""]
        lines.append([*row[:-1], first])
        lines += [[*[""] * (len(row) - 1), other] for other in others]
    return lines
