"""Healing students with bridges: folded weights train as the plan says, run-time bridges always."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from heal.toys import toy_collate, toy_samples
from tiny import tiny_inputs

from interlace.errors import DataError
from interlace.export import export
from interlace.heal import heal
from interlace.models import VLM, family_of, open_model
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from pathlib import Path


def _healed(
    bridges: str, tune: tuple[int, ...], dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    model = tiny.qwen3_vl(text=6, vision=4).to(dtype)
    teacher = VLM(model, family_of(model), name="qwen3_vl")
    data = [tiny_inputs("qwen3_vl", model, batch=4, seed=seed) for seed in range(2)]
    plan = Plan({"text": TowerPlan(6, drop=(4,), tune=tune)})
    rank: dict[str, Any] = {"rank": 2} if bridges == "lowrank" else {}
    student = prune(teacher, plan, bridges=bridges, data=data, **rank)
    assert [bridge.kind for bridge in student.record.bridges] == [bridges]
    taught = teacher.fingerprint
    before = {name: value.detach().clone() for name, value in student.model.named_parameters()}
    report = heal(
        student,
        teacher=teacher,
        data=toy_samples(8),
        collate=toy_collate("qwen3_vl", model),
        max_steps=2,
        batch_size=4,
        learning_rate=1e-2,
        **settings,
    )
    assert teacher.fingerprint == taught
    changed = {n for n, p in student.model.named_parameters() if not torch.equal(p, before[n])}
    assert report.trainable_parameters == sum(
        p.numel() for p in student.model.parameters() if p.requires_grad
    )
    return student, changed, report


def test_a_run_that_fails_at_once_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not finite at step 1"):
        _healed("fold", (3,), output=tmp_path / "out", hidden_weight=1e39)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tune", [(3,), (2,)])
def test_a_folded_projection_trains_only_where_the_plan_tunes_its_layer(
    tune: tuple[int, ...],
) -> None:
    student, changed, _ = _healed("fold", tune)
    assert student.record.bridges[0].after == 3
    prefix = f"{student.towers['text'].path}.{tune[0]}."
    assert changed
    assert all(name.startswith(prefix) for name in changed)
    assert (f"{student.towers['text'].path}.3.mlp.down_proj.weight" in changed) == (tune == (3,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "leaves"), [("diagonal", ("scale",)), ("lowrank", ("down", "up"))]
)
def test_run_time_bridges_train_even_alone(
    kind: str, leaves: tuple[str, ...], dtype: torch.dtype, tmp_path: Any
) -> None:
    student, changed, _ = _healed(kind, (), dtype)
    module = f"{student.towers['text'].path}.4.bridge_input"
    assert changed == {f"{module}.{leaf}" for leaf in leaves}
    again = open_model(export(student, tmp_path / "out", verify=False))
    stored = dict(again.model.named_parameters())
    for name, parameter in student.model.named_parameters():
        assert torch.equal(stored[name], parameter)
        assert stored[name].dtype == dtype
    if dtype is not torch.float32:
        # .to(bfloat16) also rounds rotary tables, which a model that is opened has in fp32
        return
    inputs = tiny_inputs("qwen3_vl", student.model)
    with torch.no_grad():
        expected, found = (vlm.model(**inputs).logits for vlm in (student, again))
    assert torch.equal(expected, found)


def test_run_time_bridges_train_beside_tuned_layers_also_recomputed() -> None:
    student, changed, report = _healed("lowrank", (5,))
    _, again, recomputed = _healed("lowrank", (5,), gradient_checkpointing=True)
    assert again == changed
    assert recomputed.final["loss"] == pytest.approx(report.final["loss"], rel=1e-4)
    path = student.towers["text"].path
    # original layer 5 stands behind the cut, with the bridge inside it
    assert all(name.startswith(f"{path}.4.") for name in changed)
    assert f"{path}.4.bridge_input.up" in changed
    assert f"{path}.4.mlp.down_proj.weight" in changed
