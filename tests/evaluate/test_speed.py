from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from interlace.data.samples import samples
from interlace.evaluate import speed
from interlace.evaluate._common import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from interlace.models import VLM


@pytest.mark.parametrize(
    ("name", "task", "rates"),
    [
        ("qwen3_vl", "vqa", {"prefill_seconds", "decode_tokens_per_second"}),
        ("blip_caption", "caption", {"prefill_seconds", "decode_tokens_per_second"}),
        ("clip", "retrieval", {"images_per_second", "texts_per_second"}),
    ],
)
def test_what_is_reported(
    tiny_vlm: Callable[..., VLM], name: str, task: str, rates: set[str]
) -> None:
    vlm = tiny_vlm(name)
    data = samples("scenes", count=3, tasks=(task,), split="test")
    (result,) = speed.measure((vlm,), data, Options(batch_size=2, max_new_tokens=3), rounds=2)
    assert result.metrics.keys() == rates | {"num_parameters", "peak_memory_bytes"}
    assert all(value > 0 for value in result.metrics.values())
    assert result.metrics["num_parameters"] == sum(p.numel() for p in vlm.model.parameters())
    details = result.details
    assert details["batch_size"] == 2
    assert details["rounds"] == 2
    # 32 pixels in patches of 8, of which Qwen merges 2 x 2
    assert details["num_image_tokens"] == 2 * (4 if name == "qwen3_vl" else 16)
    for rate in rates:
        spread = details["spread"][rate]
        assert spread["p20"] <= result.metrics[rate] <= spread["p80"]


def test_models_take_turns_and_medians_are_reported(
    tiny_vlm: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    made = iter(range(2))

    def fake(*_: Any) -> tuple[Callable[[], dict[str, float]], dict[str, Any]]:
        index = next(made)
        values = iter((0.0, 5.0, 1.0, 3.0, 2.0, 4.0))

        def once() -> dict[str, float]:
            calls.append(index)
            return {"prefill_seconds": next(values) + 10 * index}

        return once, {}

    monkeypatch.setattr(speed, "_generator", fake)
    data = samples("scenes", count=1, tasks=("vqa",), split="test")
    pair = (tiny_vlm("qwen3_vl"), tiny_vlm("qwen3_vl"))
    results = speed.measure(pair, data, Options(), rounds=5)
    # one untimed run each, then rounds whose order alternates
    assert calls == [0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert [result.metrics["prefill_seconds"] for result in results] == [3.0, 13.0]
    assert results[0].details["spread"]["prefill_seconds"] == pytest.approx(
        {"p20": 1.8, "p80": 4.2}
    )


def test_memory_that_a_call_needs_is_seen() -> None:
    kept: list[torch.Tensor] = []
    size = 48 * 2**20
    found = speed._memory_increase(
        lambda: kept.append(torch.ones(size, dtype=torch.uint8)), torch.device("cpu")
    )
    assert 0.9 * size < found < 2 * size
