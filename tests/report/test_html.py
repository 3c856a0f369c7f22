from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from interlace.errors import CheckpointError, ConfigError, ShapeError
from interlace.records import Plan, Provenance, TowerPlan
from interlace.report.html import Section, render_report, write_report
from interlace.report.plots import plan_strip

if TYPE_CHECKING:
    from pathlib import Path

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are nested and closed, and collects cells, images and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def strip_plan() -> Plan:
    tower = TowerPlan(num_layers=8, drop=(2,), tune=(3,), freeze=(4,))
    return Plan(towers={"text": tower}, rule="interlace")


def test_page_is_whole_and_reaches_for_nothing(tmp_path: Path) -> None:
    section = Section(
        "Retention",
        text="First.",
        table=(("rule", "kept"), [("interlace", "98.1 %"), ("random", 0.913)]),
        figure=plan_strip(strip_plan()),
    )
    sections = [section, Section("Two"), Section("Three")]
    target = write_report(tmp_path / "new" / "report.html", title="A model", sections=sections)
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert [each["href"] for each in page.all("a")] == ["#part-1", "#part-2", "#part-3"]
    assert [each["id"] for each in page.all("section")] == ["part-1", "part-2", "part-3"]
    plain = re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"https?://|//[a-z]|<script|<link|@import|url\(", plain)
    assert "prefers-color-scheme: dark" in text
    assert text.count("<p>") == 1
    (image,) = page.all("img")
    assert image["alt"] == "Retention"
    kind, content = str(image["src"]).split(",", 1)
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.width > int(str(image["width"])) > 300
    assert list(target.parent.iterdir()) == [target]


def test_everything_given_is_escaped() -> None:
    bad = "<script>alert('x')</script>&\""
    figure = plan_strip(strip_plan())
    text = render_report(
        title=bad,
        sections=[Section(bad, text=bad, table=((bad, "n"), [(bad, 1)]), figure=figure)],
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 7
    Page(text)


def test_columns_of_numbers_are_flush_right() -> None:
    rows = [("a", "1,024", "97.5 %", "12"), ("b", "\u22123", "", "not measured")]
    page = Page(render_report(title="t", sections=[Section("s", table=(tuple("wxyz"), rows))]))
    flush = [each.get("class") == "number" for each in page.all("th") if each["scope"] == "col"]
    assert flush == [False, True, True, False]


def test_provenance_stands_at_the_end() -> None:
    text = render_report(title="t", sections=[Section("s")])
    tail = text[text.index("<footer>") :]
    assert f"<dt>interlace-vlm</dt><dd>{Provenance.collect().package_version}</dd>" in tail
    assert "<dt>seed</dt>" not in tail


def test_bad_input_is_refused_in_words_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    with pytest.raises(ConfigError, match="no section"):
        write_report(target, title="t", sections=[])
    with pytest.raises(ConfigError, match="no title"):
        write_report(target, title=" ", sections=[Section("s")])
    with pytest.raises(ShapeError, match=r"row 1 of the table has 1 cells for 2 columns"):
        write_report(target, title="t", sections=[Section("s", table=(("a", "b"), [(1, 2), (3,)]))])
    assert not target.exists()
    with pytest.raises(CheckpointError):
        write_report(tmp_path, title="t", sections=[Section("s")])
