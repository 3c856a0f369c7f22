"""One self-contained HTML page from texts, tables and figures.

The page holds everything inline: no script, no font, no address outside of it. It reads well in
light and in dark mode, on paper and on a narrow screen.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, fields
from importlib import resources
from typing import TYPE_CHECKING

import jinja2

from interlace._files import atomic_write_text
from interlace.errors import ConfigError, ShapeError
from interlace.records import Provenance

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

_PNG = b"\x89PNG\r\n\x1a\n"
_SVG = re.compile(
    rb"^\s*(<\?xml[^>]*>\s*)?(<!DOCTYPE[^>]*>\s*)?(<!--.*?-->\s*)*<svg[\s>]", re.DOTALL
)
_NUMBER = re.compile(r"[-+\u2212]?[\d.,]+(\s?[%\u00d7a-zA-Z/]{0,6})?$")
_PROVENANCE_WORDS = {"package_version": "interlace-vlm"}


@dataclass(frozen=True)
class Section:
    """One part of the page; whatever is empty is left out.

    Attributes:
        title: its heading.
        text: plain text; blank lines part paragraphs.
        table: the header, and rows with as many cells. Cells are shown as `str` gives them; columns
            of numbers are set flush right.
        figure: a matplotlib figure, or the content of a PNG or SVG file.
        caption: what the figure or table shows, in a sentence.
        code: text to be shown as it is laid out, such as `str(plan)`.
    """

    title: str
    text: str = ""
    table: tuple[Sequence[str], Sequence[Sequence[object]]] | None = None
    figure: Figure | bytes | None = None
    caption: str = ""
    code: str = ""


@dataclass(frozen=True)
class _Cell:
    text: str
    number: bool


@dataclass(frozen=True)
class _Part:
    """A section as the template takes it."""

    anchor: str
    title: str
    paragraphs: list[str]
    header: list[_Cell]
    rows: list[list[_Cell]]
    image: str
    image_width: int | None
    caption: str
    code: str


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    provenance: Provenance | None = None,
) -> Path:
    """Write the page, whole or not at all; an existing file is replaced.

    Args:
        path: the .html file; missing parent folders are created.
        title: heading of the page.
        sections: its parts, at least one.
        subtitle: one line under the heading.
        provenance: where the figures were made; default: this process.

    Returns:
        The path.

    Raises:
        ConfigError: no title, no section, or a figure of an unknown kind.
        ShapeError: a table row that does not fit its header.
        CheckpointError: the file cannot be written.
    """
    text = render_report(title=title, sections=sections, subtitle=subtitle, provenance=provenance)
    return atomic_write_text(path, text)


def render_report(
    *,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    provenance: Provenance | None = None,
) -> str:
    """Return the page as text; see `write_report`."""
    if not title.strip():
        raise ConfigError("The report has no title; give one, such as the name of the model.")
    if not sections:
        raise ConfigError("The report has no section; give at least one.")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("interlace.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    made = Provenance.collect() if provenance is None else provenance
    return environment.from_string(source).render(
        title=title,
        subtitle=subtitle,
        parts=[_part(number, section) for number, section in enumerate(sections, start=1)],
        provenance=_facts(made),
    )


def _facts(provenance: Provenance) -> list[tuple[str, str]]:
    facts = []
    for each in fields(provenance):
        value = getattr(provenance, each.name)
        if value not in ("", None):
            facts.append((_PROVENANCE_WORDS.get(each.name, each.name), str(value)))
    return facts


def _part(number: int, section: Section) -> _Part:
    header, rows = _table(section)
    image, width = _image(section)
    return _Part(
        anchor=f"part-{number}",
        title=section.title,
        paragraphs=[text.strip() for text in re.split(r"\n\s*\n", section.text) if text.strip()],
        header=header,
        rows=rows,
        image=image,
        image_width=width,
        caption=section.caption,
        code=section.code,
    )


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


def _image(section: Section) -> tuple[str, int | None]:
    """The figure as a data address, and its width in CSS pixels where it states one."""
    figure = section.figure
    if figure is None:
        return "", None
    width = None
    if isinstance(figure, bytes):
        content = figure
    elif hasattr(figure, "savefig"):
        from interlace.report.plots import figure_bytes

        content = figure_bytes(figure, "png", dpi=DOTS_PER_INCH)
        width = round(figure.get_figwidth() * CSS_PIXELS_PER_INCH)
    else:
        content = b""
    if content.startswith(_PNG):
        kind = "image/png"
    elif _SVG.match(content):
        kind = "image/svg+xml"
    else:
        raise ConfigError(
            f"Section '{section.title}': the figure is a {type(figure).__name__} that is neither a "
            "matplotlib figure nor the content of a PNG or SVG file."
        )
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}", width
