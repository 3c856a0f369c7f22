"""The timing of whole models, on models that take no time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import e2e
import e2e_models
import pytest
import torch
from e2e_gate import logits_error

import interlace as il
from interlace.microbenchmarks import results
from interlace.microbenchmarks.timing import Effort

if TYPE_CHECKING:
    from pathlib import Path

TINY = {
    "qwen3-vl-8b": ({"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 8}, 64),
    "llava-1.5-7b": ({"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 4}, 28),
    "clip-l": ({"hidden_size": 32, "num_hidden_layers": 4}, 28),
}


@pytest.fixture
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (text, side) in TINY.items():
        size = e2e_models.SIZES[name]
        heads = {"num_attention_heads": 2, "intermediate_size": 48}
        vision = {**size.vision, "hidden_size": 32, "intermediate_size": 48}
        if size.family == "qwen3_vl":
            vision |= {"depth": 3, "num_heads": 2, "out_hidden_size": 32}
            vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        else:
            vision |= {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": side}
        if size.family != "clip":
            heads |= {"num_key_value_heads": 1 if size.family == "qwen3_vl" else 2}
        tiny = replace(
            size, text={**size.text, **heads, **text}, vision=vision, image_side=side, words=12
        )
        monkeypatch.setitem(e2e_models.SIZES, name, tiny)
    monkeypatch.setattr(e2e, "FULL", {"cpu": Effort(rounds=2, turn_seconds=1e-3)})
    ways = ("sdpa", "fused", "fused static", "eager")
    preset = e2e.Preset("cpu", tuple(TINY), (1, 2), 2, 2, 1, ways)
    monkeypatch.setitem(e2e.PRESETS, "small", preset)


def _run(tmp_path: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    status = e2e.main(["--dtype", "float32", "--output", str(tmp_path), *options])
    return status, results.read_lines(tmp_path / f"e2e-small-{results.today()}.jsonl")


@pytest.mark.usefixtures("tiny_sizes")
def test_every_model_and_way_is_timed(tmp_path: Path) -> None:
    status, (header, *records) = _run(tmp_path)
    assert status == 0
    assert header["ceilings"]["copy_gb_per_s"] > 0
    found = {(each["model"], each["batch"]): each for each in records if each["kind"] == "e2e"}
    assert set(found) == {(name, batch) for name in TINY for batch in (1, 2)}
    for (name, _), each in found.items():
        assert each["left_out"] == {}
        rows = {(row["pruned"], row["way"]): row for row in each["rows"]}
        assert len(rows) == (6 if name == "clip-l" else 8)
        base = rows[e2e.BASELINE]
        assert base["ttft_ratio_to_dense_sdpa"] == 1
        for row in rows.values():
            ratio = base["ttft_processor_ms"] / row["ttft_processor_ms"]
            assert row["ttft_ratio_to_dense_sdpa"] == pytest.approx(ratio, rel=1e-4)
            assert (row["decode_tokens_per_s"] is None) == (name == "clip-l")
            assert row["entries"] == 2
            assert row["logits_error"] < 1e-5
    assert sum(each["kind"] == "report" for each in records) == len(TINY)


@pytest.mark.usefixtures("tiny_sizes")
def test_what_fails_or_does_not_fit_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(e2e.il, "fuse", broken, raising=False)
    status, records = _run(tmp_path, "--models", "clip-l")
    assert (status, records[-1]["kind"]) == (1, "left_out")
    assert "no kernel" in records[-1]["reason"]


@pytest.mark.usefixtures("tiny_sizes")
def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = il.fuse

    def wrong(model: Any, **options: Any) -> Any:
        report = stock(model, **options)
        model.logit_scale.mul_(-1)
        return report

    monkeypatch.setattr(e2e.il, "fuse", wrong, raising=False)
    _, records = _run(tmp_path, "--models", "clip-l", "--ways", "sdpa", "fused")
    for record in records[2:]:
        assert {row["way"] for row in record["rows"]} == {"sdpa"}
        assert all("logits are" in reason for reason in record["left_out"].values())
        assert record["left_out"]


def test_errors_count_until_the_tokens_differ() -> None:
    one = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert logits_error([one, one], [one, one]) == 0
    assert logits_error([one * 1.1, one], [one, one]) == pytest.approx(0.1, rel=1e-5)
    # the second row goes on from another token
    other = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    first = logits_error([other], [one])
    assert logits_error([other, one * torch.tensor([[1.0], [9.0]])], [one, one]) == first
    assert logits_error([one * float("nan")], [one]) == float("inf")


@pytest.mark.usefixtures("tiny_sizes")
def test_a_budget_leaves_the_baseline(tmp_path: Path) -> None:
    _, records = _run(tmp_path, "--models", "clip-l", "--budget", "0.001")
    for record in records[2:]:
        assert [row["way"] for row in record["rows"]] == ["sdpa"]
        assert set(record["left_out"].values()) == {"the time of --budget was spent"}


@pytest.mark.usefixtures("tiny_sizes")
def test_work_is_counted_by_weights_and_tokens() -> None:
    size = e2e_models.SIZES["llava-1.5-7b"]
    device, dtype = torch.device("cpu"), torch.float32
    model = e2e_models.build(size, device, dtype)
    inputs = e2e_models.inputs_of(size, 2, device, dtype)
    assert inputs["input_ids"].shape == (2, 16)
    text = sum(p.numel() for p in model.model.language_model.layers.parameters())
    vision = sum(p.numel() for p in model.model.vision_tower.encoder.layers.parameters())
    assert e2e_models.text_parameters(model) == text + model.lm_head.weight.numel()
    assert e2e_models.parameters_at_work(model, inputs) == 2 * (16 * text + 5 * vision)
    student = e2e_models.without_a_quarter(model)
    assert len(student.model.language_model.layers) == 3
