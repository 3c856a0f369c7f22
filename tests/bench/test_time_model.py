"""The benchmark of the time that splits are counted in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import time_model

import interlace as il
from interlace.evaluate._common import TaskResult

if TYPE_CHECKING:
    from collections.abc import Sequence

FIXED = 0.3


def _taken(models: Sequence[Any], *_: Any, **__: Any) -> list[TaskResult]:
    """Let a layer take a second, three tenths of it at any width, and all else take two."""
    shapes = [vlm.shape().towers["text"] for vlm in models]
    full = sum(shapes[0].layer_parameters) / shapes[0].num_layers
    seconds = [
        2 + FIXED * shape.num_layers + (1 - FIXED) * sum(shape.layer_parameters) / full
        for shape in shapes
    ]
    return [TaskResult({"decode_tokens_per_second": 1 / each}) for each in seconds]


def test_what_is_counted_is_measured_where_time_is_as_assumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time_model, "measure", _taken)
    monkeypatch.setattr(il, "fixed_time", lambda *_, **__: {"text": FIXED})
    rows = time_model.compare(time_model.build("small"), "decode", 2, 3)["mixes"]
    assert len(rows) == len(time_model.MIXES)
    for row in rows:
        assert row["counted"] == pytest.approx(row["measured"])
    # six layers, of which half go in the first mix
    assert rows[0]["layers_gone"] == rows[0]["parameters_gone"] == 0.5
    assert rows[0]["speedup"] == pytest.approx(8 / 5)
    # narrower ones have lost more of their parameters than of their time
    assert rows[2]["layers_gone"] == 0
    assert 0 < rows[2]["counted"] < rows[2]["parameters_gone"]
