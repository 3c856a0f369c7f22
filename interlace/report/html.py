"""One self-contained HTML page from texts, tables and figures.

The page holds everything inline: no script, no font, no address outside of it. It reads well in
light and in dark mode, on paper and on a narrow screen.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, fields
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from interlace._files import atomic_write_text
from interlace.errors import ConfigError, ShapeError
from interlace.records import Provenance
from interlace.report.plots import figure_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

__all__ = ["Section", "render_report", "write_report"]

TEMPLATE = "template.html.j2"
DOTS_PER_INCH = 160
# CSS counts 96 pixels to the inch
CSS_PIXELS_PER_INCH = 96

_NUMBER = re.compile(r"[-+\u2212]?[\d.,]+(\s?[%\u00d7a-zA-Z/]{0,6})?$")
_PROVENANCE_WORDS = {"package_version": "interlace-vlm"}


@dataclass(frozen=True)
class Section:
    """One part of the page; whatever is empty is left out.

    Attributes:
        title: its heading.
        text: a paragraph.
        table: the header, and rows with as many cells. Cells are shown as `str` gives them; columns
            of numbers are set flush right.
        figure: what it shows.
    """

    title: str
    text: str = ""
    table: tuple[Sequence[str], Sequence[Sequence[object]]] | None = None
    figure: Figure | None = None


class _Cell(NamedTuple):
    text: str
    number: bool


def write_report(path: str | os.PathLike[str], *, title: str, sections: Sequence[Section]) -> Path:
    """Write the page, whole or not at all; an existing file is replaced.

    Args:
        path: the .html file; missing parent folders are created.
        title: heading of the page.
        sections: its parts, at least one.

    Returns:
        The path.

    Raises:
        ConfigError: no title, or no section.
        ShapeError: a table row that does not fit its header.
        CheckpointError: the file cannot be written.
    """
    return atomic_write_text(path, render_report(title=title, sections=sections))


def render_report(*, title: str, sections: Sequence[Section]) -> str:
    """Return the page as text; see `write_report`."""
    if not title.strip():
        raise ConfigError("The report has no title; give one, such as the name of the model.")
    if not sections:
        raise ConfigError("The report has no section; give at least one.")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("interlace.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title,
        parts=[(section, _table(section), _image(section.figure)) for section in sections],
        provenance=_facts(Provenance.collect()),
    )


def _facts(provenance: Provenance) -> list[tuple[str, str]]:
    facts = []
    for each in fields(provenance):
        value = getattr(provenance, each.name)
        if value not in ("", None):
            facts.append((_PROVENANCE_WORDS.get(each.name, each.name), str(value)))
    return facts


def _table(section: Section) -> tuple[list[_Cell], list[list[_Cell]]]:
    if section.table is None:
        return [], []
    titles, rows = section.table
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for index, row in enumerate(texts):
        if len(row) != len(titles):
            raise ShapeError(
                f"Section '{section.title}': row {index} of the table has {len(row)} cells for "
                f"{len(titles)} columns. Give every row one cell per column."
            )
    numbers = []
    for column in range(len(titles)):
        filled = [row[column] for row in texts if row[column]]
        numbers.append(bool(filled) and all(_NUMBER.match(text) for text in filled))
    header = [_Cell(text, number) for text, number in zip(titles, numbers, strict=True)]
    cells = [
        [_Cell(text, number) for text, number in zip(row, numbers, strict=True)] for row in texts
    ]
    return header, cells


def _image(figure: Figure | None) -> tuple[str, int]:
    """A figure as a data address, and its width in CSS pixels."""
    if figure is None:
        return "", 0
    content = base64.b64encode(figure_bytes(figure, dpi=DOTS_PER_INCH)).decode("ascii")
    return f"data:image/png;base64,{content}", round(figure.get_figwidth() * CSS_PIXELS_PER_INCH)
