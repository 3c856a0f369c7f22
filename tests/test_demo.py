"""The demonstration runs through, and its page holds what it says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from interlace.demo import RULES, run_demo
from interlace.evaluate.speed import measure as measure_speed
from interlace.records import EvalReport, Plan

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.models import VLM


# it chooses, heals and measures four students: some 90 s on a quiet core
@pytest.mark.timeout(600)
def test_quick_demo_prints_a_table_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[list[int]] = []

    def measure(models: list[VLM], *args: Any, **options: Any) -> Any:
        timed.append([vlm.towers["text"].num_layers for vlm in models])
        return measure_speed(models, *args, **options)

    monkeypatch.setattr("interlace.demo.measure_speed", measure)
    page = run_demo(tmp_path / "demo", quick=True)
    text = page.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    # one run for all: a busy minute slows every model alike
    assert timed == [[16, 12, 12, 12, 12]]
    for rule in ("dense", *RULES):
        assert rule in printed
        assert rule in text
    assert f"dropped by {len(RULES)} rules" in text
    # heat map, retention chart and one strip per rule, all inside the page
    assert len(re.findall(r"data:image/png;base64,|<svg", text)) >= 2 + len(RULES)
    assert not re.search(r"(?:src|href)=[\"']https?:", text)
    for rule in RULES:
        plan = Plan.load(page.parent / f"plan-{rule}.json")
        assert len(plan["text"].drop) == 4
        report = EvalReport.load(page.parent / f"eval-{rule}.json")
        assert report.retention is not None
