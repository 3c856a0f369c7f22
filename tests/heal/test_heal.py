from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from heal.toys import toy, toy_collate, toy_plan, toy_samples
from tiny_processors import with_processor

from interlace.config import HealSettings
from interlace.data.samples import Turn, samples, scenes_tasks
from interlace.errors import ConfigError, DataError
from interlace.heal import heal
from interlace.heal.anchors import anchor_layers
from interlace.heal.healing import _device_arguments
from interlace.heal.shell import move_together
from interlace.heal.trainer import HealTrainer
from interlace.records import HealReport, Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.models import VLM


def _heal(
    name: str, student: VLM, teacher: VLM | None, count: int = 8, **settings: Any
) -> HealReport:
    chosen = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, **settings}
    collate = toy_collate(name, student.model)
    return heal(student, teacher=teacher, data=toy_samples(count), collate=collate, **chosen)


def _values(vlm: VLM) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in vlm.model.state_dict().items()}


def _changed(vlm: VLM, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, value in vlm.model.state_dict().items() if not torch.equal(value, before[n])}


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("qwen3_vl", ("text", "vision")),
        ("clip", ("text", "vision")),
        ("blip_caption", ("text",)),
        ("blip_vqa", ("text",)),
    ],
)
def test_only_the_tuned_layers_change(name: str, towers: tuple[str, ...]) -> None:
    teacher, student = toy(name, towers)
    taught, before = _values(teacher), _values(student)
    flags = {n: p.requires_grad for n, p in student.model.named_parameters()}
    random = torch.random.get_rng_state()
    report = _heal(name, student, teacher)

    assert student.plan is not None
    tuned = [f"{student.towers[tower].path}.1." for tower in student.plan.towers]
    changed = _changed(student, before)
    assert {path for path in tuned if any(n.startswith(path) for n in changed)} == set(tuned)
    assert all(n.startswith(tuple(tuned)) for n in changed)
    assert _changed(teacher, taught) == set()
    assert flags == {n: p.requires_grad for n, p in student.model.named_parameters()}
    assert not student.model.training
    assert torch.equal(random, torch.random.get_rng_state())
    assert not any(module._forward_hooks for module in student.model.modules())

    trained = [p for n, p in student.model.named_parameters() if n.startswith(tuple(tuned))]
    assert report.trainable_parameters == sum(p.numel() for p in trained)
    assert report.steps == 2
    assert report.num_samples == 8
    assert report.objective == student.family.objective
    assert set(report.final) >= {"step", "loss", "ce", "hidden", "kl", "learning_rate"}
    assert HealReport.from_json(report.to_json()) == report


def test_the_loss_goes_down() -> None:
    teacher, student = toy("qwen3_vl")
    report = _heal("qwen3_vl", student, teacher, max_steps=30, warmup_fraction=0.1)
    first, last = report.losses[0], report.losses[-1]
    assert len(report.losses) == 30
    for term in ("loss", "ce", "hidden"):
        assert last[term] < 0.8 * first[term], term


def test_accumulated_steps_equal_large_ones() -> None:
    results = []
    for split in ({"batch_size": 8}, {"batch_size": 4, "accumulation": 2}):
        teacher, student = toy("llava")
        report = _heal("llava", student, teacher, count=16, **split)
        results.append((_values(student), report))
    (one, whole), (other, parts) = results
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)
    for left, right in zip(whole.losses, parts.losses, strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    assert whole.tokens == parts.tokens > 0


def test_recomputing_activations_changes_nothing() -> None:
    results = []
    for recompute in (False, True):
        teacher, student = toy("qwen3_vl", ("text", "vision"))
        _heal("qwen3_vl", student, teacher, gradient_checkpointing=recompute)
        results.append(_values(student))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


# InternVL's layers have a factor per channel, which autocast leaves alone
@pytest.mark.parametrize(("name", "tower"), [("qwen3_vl", "text"), ("internvl", "vision")])
def test_half_precision_is_trained_in_fp32_and_stays_half(name: str, tower: str) -> None:
    teacher, student = toy(name, (tower,), dtype=torch.bfloat16)
    before = _values(student)
    report = _heal(name, student, teacher, validation=toy_samples(8))
    changed = _changed(student, before)
    assert report.share > 0
    assert changed
    assert {value.dtype for value in student.model.state_dict().values()} == {torch.bfloat16}
    assert report.final["loss"] > 0


def test_healing_without_a_teacher_is_the_published_loss() -> None:
    _, student = toy("qwen3_vl")
    report = _heal("qwen3_vl", student, None)
    assert report.final["loss"] == pytest.approx(report.final["ce"])
    assert "hidden" not in report.final


def test_no_steps_leave_the_student_alone() -> None:
    teacher, student = toy("qwen3_vl")
    before = _values(student)
    report = _heal("qwen3_vl", student, teacher, max_steps=None, epochs=0.0)
    assert report.steps == 0
    assert _changed(student, before) == set()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    teacher, student = toy("qwen3_vl")
    with torch.no_grad():
        next(teacher.towers["text"].layers[1].parameters()).fill_(float("nan"))
    before = _values(student)
    with pytest.raises(DataError, match="not finite at step 1"):
        _heal("qwen3_vl", student, teacher, output=tmp_path / "out")
    assert _changed(student, before) == set()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("validation_fraction", [0.0, 0.5])
def test_weights_that_the_last_step_spoiled_are_not_handed_over(
    validation_fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = toy("qwen3_vl")
    before = _values(student)
    plain = HealTrainer.training_step

    def training_step(self: HealTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        if self.state.global_step == 1:
            next(p for p in self.healed.parameters() if p.requires_grad).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(HealTrainer, "training_step", training_step)
    with pytest.raises(DataError, match="not finite after the last step, 2"):
        _heal("qwen3_vl", student, teacher, validation_fraction=validation_fraction)
    assert _changed(student, before) == set()


def test_bad_input_is_refused_in_words(tmp_path: Path) -> None:
    teacher, student = toy("llava")
    assert student.plan is not None
    with pytest.raises(DataError, match="healing data holds no sample"):
        _heal("llava", student, teacher, count=0)
    with pytest.raises(ConfigError, match="max_steps"):
        _heal("llava", student, teacher, max_stepz=3)
    with pytest.raises(ConfigError, match="settings is a dict; give HealSettings"):
        _heal("llava", student, teacher, settings={})
    spread, _ = toy("llava")
    spread.model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1}
    with pytest.raises(ConfigError, match=r"spread over 0, 1 \(device_map\), and healing"):
        _heal("llava", student, spread)
    with pytest.raises(ConfigError, match="exists already"):
        _heal("llava", student, teacher, output=tmp_path)
    with pytest.raises(ConfigError, match="output folder that holds"):
        _heal("llava", student, teacher, resume=True)
    with pytest.raises(ConfigError, match="same model"):
        _heal("llava", student, student)
    with pytest.raises(ConfigError, match="family"):
        _heal("llava", student, toy("qwen3_vl")[0])
    with pytest.raises(ConfigError, match="carries no plan"):
        _heal("llava", teacher, None)
    student.plan = Plan(towers={"text": TowerPlan(num_layers=5, drop=(1,))}, rule="last")
    with pytest.raises(ConfigError, match="no layers to tune"):
        _heal("llava", student, teacher)
    student.plan = toy_plan(text=5)
    student.plan = replace(
        student.plan, towers={"text": replace(student.plan["text"], tune=(4,), drop=(2,))}
    )
    with pytest.raises(ConfigError, match="do not match"):
        _heal("llava", student, teacher)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("internvl", {"turns": (Turn("user", "<image>what?"),)}, "no assistant turn"),
        ("clip", {"images": ()}, "has 0 images, but this model takes exactly one"),
        ("clip", {"turns": (), "references": ()}, "has no caption"),
        ("blip_vqa", {"turns": (Turn("user", "what?"),)}, "no assistant turn"),
    ],
)
def test_samples_that_training_would_stop_at_are_refused_before_it(
    name: str, change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    teacher = with_processor(name)
    data = samples("scenes", count=4, tasks=scenes_tasks(teacher.family.objective))
    bad = [*data[:3], replace(data[3], **change)]
    depths = {tower: each.num_layers for tower, each in teacher.towers.items() if "text" in tower}
    student = prune(teacher, toy_plan(**depths))
    with pytest.raises(DataError, match=f"1 of 4 samples cannot be trained on. .*{says}"):
        heal(student, teacher=teacher, data=bad, batch_size=2, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_on_the_cpu_trains_there_beside_gpus_and_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    _, student = toy("llava")
    assert _device_arguments(student, (), HealSettings())["use_cpu"]


def test_without_anchors_the_layer_behind_each_drop_is_compared() -> None:
    def layers(earlier: tuple[int, ...] = (), **cut: Any) -> tuple[int, ...]:
        plan = TowerPlan(num_layers=6, **cut)
        return anchor_layers(plan, [layer for layer in plan.kept if layer not in earlier])

    assert layers(drop=(1, 2, 5), tune=(0,)) == (3,)
    assert layers(drop=(4, 0), tune=(1, 2)) == (1, 5)
    assert layers(drop=(1,), tune=(2,), freeze=(3,)) == (3,)
    # what an earlier cut took is not there to be compared
    assert layers(drop=(1,), tune=(0,), earlier=(2,)) == (3,)


def test_a_student_that_was_pruned_again_is_healed_by_either_model_before_it() -> None:
    teacher, student = toy("llava")
    first = Plan({"text": TowerPlan(num_layers=5, drop=(2,), tune=(3,))})
    again = Plan({"text": TowerPlan(num_layers=5, drop=(1,), tune=(0,))})
    for by_first in (False, True):
        student = prune(teacher, first)
        smaller = prune(student, again)
        assert smaller.towers["text"].original == (0, 3, 4)
        report = _heal("llava", smaller, student if by_first else teacher)
        assert report.losses[0]["hidden"] > 0.0


@pytest.mark.gpu
def test_healing_on_a_gpu_keeps_frozen_weights_shared() -> None:
    teacher, student = toy("qwen3_vl", ("text", "vision"), dtype=torch.bfloat16)
    device = torch.device("cuda", 0)
    move_together([student.model, teacher.model], device)
    taught, before = _values(teacher), _values(student)
    report = _heal(
        "qwen3_vl", student, teacher, max_steps=20, num_workers=1, validation=toy_samples(8)
    )
    assert report.share > 0
    assert report.losses[-1]["loss"] < report.losses[0]["loss"]
    assert _changed(teacher, taught) == set()
    changed = _changed(student, before)
    assert changed
    pointers = {parameter.data_ptr() for parameter in teacher.model.parameters()}
    for name, parameter in student.model.named_parameters():
        assert parameter.device == device
        tuned = name.startswith(("model.language_model.layers.1.", "model.visual.blocks.1."))
        assert (parameter.data_ptr() in pointers) is not tuned, name
        assert tuned or name not in changed
