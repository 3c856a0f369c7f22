from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from heal.toys import toy, toy_collate, toy_samples
from torch import nn

from interlace.config import HealSettings
from interlace.data.samples import Samples
from interlace.errors import ConfigError, DataError
from interlace.heal import heal
from interlace.heal.interpolation import SHARES, interpolate, split_off
from interlace.records import HealReport


def _kept(losses: dict[float, float], end: float = 4.0) -> tuple[float, list[float]]:
    """Settle a single weight between 0 and `end`; losses are by the place on the way."""
    weight = nn.Parameter(torch.tensor([end]))

    def validate() -> dict[str, float]:
        return {"loss": losses[weight.item() / end]}

    points = interpolate({"weight": weight}, lambda _: torch.zeros(1), validate)
    return weight.item() / end, [point["share"] for point in points]


def test_the_best_point_of_the_way_is_kept_and_reported_first() -> None:
    assert SHARES == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert _kept({0.0: 3.0, 0.25: 1.0, 0.5: 2.0, 0.75: 4.0, 1.0: 5.0}) == (
        0.25,
        [0.25, 0.5, 0.0, 0.75, 1.0],
    )
    # of equal ones the furthest, and what is not finite is worst
    assert _kept({0.0: 3.0, 0.25: 1.0, 0.5: 1.0, 0.75: math.nan, 1.0: math.inf})[0] == 0.5
    assert _kept(dict.fromkeys(SHARES, 1.0))[0] == 1.0


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_both_ends_are_exact(kept: float) -> None:
    start, end = torch.randn(64) * 1e-3, torch.randn(64) * 1e3
    weight = nn.Parameter(end.clone())
    shares = iter(SHARES)

    def validate() -> dict[str, float]:
        return {"loss": float(next(shares) != kept)}

    interpolate({"weight": weight}, {"weight": start}.__getitem__, validate)
    assert torch.equal(weight, end if kept else start)


def test_samples_are_split_at_random_and_once_for_all() -> None:
    data = toy_samples(40)

    def split(share: float, seed: int = 3, objective: str = "chat", count: int = 40) -> list[Any]:
        settings = HealSettings(validation_fraction=share, seed=seed)
        parts = split_off(Samples(data[:count]), settings, objective)
        return [[sample.id for sample in part] for part in parts]

    ids = [sample.id for sample in data]
    training, validation = split(0.1)
    assert len(validation) == 4
    assert sorted([*training, *validation]) == sorted(ids)
    assert split(0.1) == [training, validation]
    assert split(0.1, seed=4)[1] != validation
    assert split(0.0) == [ids, []]
    # a single pair has nothing to be told from
    assert [len(split(0.01, objective=kind)[1]) for kind in ("chat", "contrastive")] == [1, 2]
    with pytest.raises(DataError, match="keeps back 2 samples, but there are only 2"):
        split(0.1, objective="contrastive", count=2)


@pytest.mark.parametrize("name", ["qwen3_vl", "clip"])
def test_healing_that_goes_too_far_is_taken_back(name: str) -> None:
    teacher, student = toy(name)
    before = {n: value.detach().clone() for n, value in student.model.state_dict().items()}
    shared: dict[str, Any] = {"collate": toy_collate(name, student.model), "batch_size": 4}
    # steps of this length leave nothing of the model; what it knows is what the teacher says
    report = heal(
        student,
        teacher=teacher,
        data=toy_samples(20),
        validation_fraction=0.2,
        ce_weight=0.0,
        learning_rate=1.0,
        warmup_fraction=0.0,
        schedule="constant",
        **shared,
    )
    assert report.num_samples == 16
    assert sorted(point["share"] for point in report.validation) == list(SHARES)
    losses = [point["loss"] for point in report.validation]
    assert losses == sorted(losses)
    for point in report.validation:
        assert point["loss"] == pytest.approx(point["kl"])
    assert report.validation[0]["share"] == 0.0
    for key, value in student.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert HealReport.from_json(report.to_json()) == report


def test_the_student_is_left_at_the_point_that_the_report_names() -> None:
    ends, kept = {}, {}
    wanted = HealSettings(validation_fraction=0.2)
    for validation_fraction in (0.0, 0.2):
        teacher, student = toy("qwen3_vl")
        start = {n: p.detach().clone() for n, p in student.model.named_parameters()}
        data = toy_samples(20)
        report = heal(
            student,
            teacher=teacher,
            data=data if validation_fraction else split_off(Samples(data), wanted, "chat")[0],
            collate=toy_collate("qwen3_vl", student.model),
            batch_size=4,
            learning_rate=1e-2,
            validation_fraction=validation_fraction,
        )
        (kept if validation_fraction else ends).update(student.model.named_parameters())
    share = report.validation[0]["share"]
    assert share > 0.0
    for name, value in kept.items():
        expected = start[name] + share * (ends[name] - start[name])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_teacher_the_task_alone_judges() -> None:
    _, student = toy("qwen3_vl")
    report = heal(
        student,
        data=toy_samples(8),
        collate=toy_collate("qwen3_vl", student.model),
        validation_fraction=0.25,
        ce_weight=2.0,
    )
    for point in report.validation:
        assert point.keys() == {"share", "ce", "loss"}
        assert point["loss"] == pytest.approx(2.0 * point["ce"])


def test_samples_of_their_own_say_the_same_as_a_share() -> None:
    data, wanted = toy_samples(20), HealSettings(validation_fraction=0.2, batch_size=4)
    training, validation = split_off(Samples(data), wanted, "chat")
    reports = []
    for given in (
        {"data": data, "settings": wanted},
        {"data": training, "validation": validation, "batch_size": 4},
    ):
        teacher, student = toy("qwen3_vl")
        collate = toy_collate("qwen3_vl", student.model)
        reports.append(heal(student, teacher=teacher, collate=collate, **given))
    assert reports[0].validation == reports[1].validation
    assert reports[0].losses == reports[1].losses
    assert "validation" not in reports[0].inputs
    assert reports[1].inputs["validation"] == validation.fingerprint


def test_settings_that_leave_nothing_to_judge_by_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing says which predictions"):
        HealSettings(validation_fraction=0.1, ce_weight=0.0, kl_weight=0.0)
    with pytest.raises(ConfigError, match="neither open nor closed"):
        HealSettings(validation_fraction=0.1, gates="l1")
    _, student = toy("qwen3_vl")
    with pytest.raises(ConfigError, match="without a teacher"):
        heal(student, data=toy_samples(8), validation_fraction=0.25, ce_weight=0.0)
    with pytest.raises(ConfigError, match="4 validation samples, and validation_fraction"):
        heal(student, data=toy_samples(8), validation=toy_samples(4), validation_fraction=0.25)
    own = {"data": toy_samples(8), "validation": toy_samples(4)}
    with pytest.raises(ConfigError, match=r"closed\. Leave validation out"):
        heal(student, **own, gates="l1")
    with pytest.raises(ConfigError, match="or leave validation out"):
        heal(student, **own, ce_weight=0.0, kl_weight=0.0)
    with pytest.raises(DataError, match="The validation data is a str"):
        heal(student, data=toy_samples(8), validation="scenes")
    with pytest.raises(DataError, match="The validation data holds no sample"):
        heal(student, data=toy_samples(8), validation=[])
