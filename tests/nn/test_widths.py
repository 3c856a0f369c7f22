"""Fused students whose layers have lost heads and neurons."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize("name", ["blip_caption", "blip2_opt", "clip", "llava", "qwen3_vl"])
def test_fused_students_compute_what_they_did(name: str, kit: Any, route: Any) -> None:
    report = kit.fused(name, kit.narrowed(name), route)
    # heads that no longer make up the width: one such attention has a fused form, one says why not
    narrow = {each.kind: each for each in report.entries if each.kind.startswith("Narrow")}
    if name == "blip_caption":
        assert narrow["NarrowBlipAttention"].fused
    elif name == "blip2_opt":
        assert "do not make up its width" in narrow["NarrowBlip2Attention"].reason
    else:
        assert not narrow
