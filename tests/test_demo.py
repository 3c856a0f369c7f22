"""The demonstration runs through, and its page holds what it says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from interlace.demo import RULES, run_demo
from interlace.records import EvalReport, Plan

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_quick_demo_prints_a_table_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = run_demo(tmp_path / "demo", quick=True)
    text = page.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for rule in ("dense", *RULES):
        assert rule in printed
        assert rule in text
    # heat map, retention chart and one strip per rule, all inside the page
    assert len(re.findall(r"data:image/png;base64,|<svg", text)) >= 2 + len(RULES)
    assert not re.search(r"(?:src|href)=[\"']https?:", text)
    for rule in RULES:
        plan = Plan.load(page.parent / f"plan-{rule}.json")
        assert len(plan["text"].drop) == 4
        report = EvalReport.load(page.parent / f"eval-{rule}.json")
        assert report.retention is not None
