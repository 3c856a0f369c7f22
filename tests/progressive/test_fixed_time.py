"""The share of a layer's time that no width changes: from what models take, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import interlace as il
from interlace.errors import ConfigError, DataError
from interlace.evaluate._common import TaskResult
from interlace.nn.swap import Fused
from interlace.progressive import fixed_time as module

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.models import VLM


@pytest.fixture(scope="module")
def qwen() -> VLM:
    return il.open_model("bundled:qwen3-vl")


@pytest.fixture(scope="module")
def clip() -> VLM:
    return il.open_model("bundled:clip")


def made_up(monkeypatch: pytest.MonkeyPatch, fixed: dict[str, float], name: str) -> None:
    """Let a layer take a second at full width, `fixed` of it at any, and all else take ten."""
    monkeypatch.setattr(module, "measure", lambda models, *_, **__: _results(models, fixed, name))


def _results(models: Sequence[VLM], fixed: dict[str, float], name: str) -> list[TaskResult]:
    whole = models[0].shape().towers
    found = []
    for vlm in models:
        seconds = 10.0
        for tower, share in fixed.items():
            shape = vlm.shape().towers[tower]
            full = sum(whole[tower].layer_parameters) / whole[tower].num_layers
            seconds += share * shape.num_layers
            seconds += (1 - share) * sum(shape.layer_parameters) / full
        value = seconds if name == "prefill_seconds" else 1 / seconds
        found.append(TaskResult({name: value}))
    return found


@pytest.mark.parametrize(
    ("phase", "name"), [("decode", "decode_tokens_per_second"), ("prefill", "prefill_seconds")]
)
def test_the_share_is_what_was_put_in(
    phase: Any, name: str, qwen: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = il.samples("scenes", count=2)
    made_up(monkeypatch, {"text": 0.3}, name)
    assert il.fixed_time(qwen, data, phase=phase) == {"text": pytest.approx(0.3)}
    # narrower layers that are slower, by noise
    made_up(monkeypatch, {"text": 1.2}, name)
    assert il.fixed_time(qwen, data, phase=phase) == {"text": 0.99}
    made_up(monkeypatch, {"vision": 0.3}, name)
    with pytest.raises(DataError, match="'text' is not faster"):
        il.fixed_time(qwen, data, phase=phase)


def test_towers_that_do_not_decode_are_timed_by_what_they_do(
    qwen: VLM, clip: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, {"vision": 0.2}, "prefill_seconds")
    found = il.fixed_time(qwen, il.samples("scenes", count=2), towers=("vision",))
    assert found == {"vision": pytest.approx(0.2)}
    pairs = il.samples("scenes", count=2, tasks=("retrieval",))
    for tower, name in (("vision", "images_per_second"), ("text", "texts_per_second")):
        made_up(monkeypatch, {tower: 0.6}, name)
        assert il.fixed_time(clip, pairs, towers=(tower,)) == {tower: pytest.approx(0.6)}


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_is_timed_and_left_as_it_is(
    fused: bool, clip: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[VLM] = []

    def run(models: Sequence[VLM], *args: Any, **kwargs: Any) -> list[TaskResult]:
        # what a busy machine makes of it must not decide
        timed.extend(models)
        parts = [part for each in models for part in each.model.modules()]
        assert any(isinstance(part, Fused) for part in parts) == fused
        for result in stock(models, *args, **kwargs):
            assert result.metrics["texts_per_second"] > 0
        return _results([clip, *models], {"text": 0.3}, "texts_per_second")[1:]

    stock = module.measure
    monkeypatch.setattr(module, "measure", run)
    before = clip.fingerprint, [type(each) for each in clip.model.modules()]
    pairs = il.samples("scenes", count=2, tasks=("retrieval",))
    found = il.fixed_time(clip, pairs, batch_size=2, rounds=2, fused=fused)
    assert found == {"text": pytest.approx(0.3)}
    assert before == (clip.fingerprint, [type(each) for each in clip.model.modules()])
    whole, shallow, narrow = (each.shape().towers["text"] for each in timed)
    assert (whole.num_layers, shallow.num_layers, narrow.num_layers) == (12, 7, 12)
    assert narrow.total_heads(cross=False)[0] == whole.total_heads(cross=False)[0] // 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"phase": "decoding"}, ConfigError, "Did you mean 'decode'"),
        ({"towers": ("txt",)}, ConfigError, "Did you mean 'text'"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"rounds": 1}, ConfigError, "rounds is 1; give at least 2"),
        ({"data": []}, DataError, "data to time the model on"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    arguments: Any, error: type[Exception], words: str, clip: VLM
) -> None:
    data = il.samples("scenes", count=2, tasks=("retrieval",))
    with pytest.raises(error, match=words):
        il.fixed_time(clip, **{"data": data, **arguments})


def test_layers_that_must_stay_or_cannot_be_cut_are_told(clip: VLM) -> None:
    shape = replace(clip.shape().towers["text"], sites={})
    with pytest.raises(ConfigError, match="No heads or neurons are known"):
        module._narrow("text", shape)
    pinned = dict.fromkeys(range(clip.towers["text"].num_layers), "needed")
    held = replace(clip.towers["text"], pinned=pinned)
    vlm: Any = type("Held", (), {"towers": {"text": held}})
    with pytest.raises(ConfigError, match="No layer of the tower 'text' may go"):
        module._shallow(vlm, "text")
