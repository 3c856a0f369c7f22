from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from heal.toys import (
    assert_gated_runs_resume,
    double_vlm,
    outputs,
    toy,
    toy_collate,
    toy_samples,
)
from tiny import tiny_inputs
from torch import nn

from interlace.errors import ConfigError
from interlace.heal import heal
from interlace.heal.sparsity import Gates, find_branches, fold, importance

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.models.handle import VLM


def test_a_gate_of_zero_takes_a_branch_away() -> None:
    """What a gate stands on is the whole branch: without both, a layer hands on its input."""
    vlm = double_vlm("qwen3_vl")
    branches = find_branches(vlm, ("text",))
    fold(vlm.model, branches, [0.0 if each.layer == 3 else 1.0 for each in branches])
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.extend([args[0] if args else kwargs["hidden_states"], output])

    vlm.towers["text"].layers[3].register_forward_hook(keep, with_kwargs=True)
    inputs = tiny_inputs("qwen3_vl", vlm.model, 2, seed=1)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    outputs(vlm.model, inputs)
    assert torch.equal(seen[0], seen[1])


def test_towers_that_cannot_be_gated_are_refused_in_words() -> None:
    vlm = double_vlm("llava")
    layer: Any = vlm.towers["text"].layers[2]
    layer.post_feedforward_layernorm = nn.Identity()
    with pytest.raises(ConfigError, match="normalises its branches"):
        find_branches(vlm, ("text",))
    del layer.post_feedforward_layernorm
    layer.mlp.experts = nn.ModuleList([layer.mlp.down_proj])
    del layer.mlp.down_proj
    with pytest.raises(ConfigError, match=r"exactly one must end its mlp branch, and none is"):
        find_branches(vlm, ("text",))
    assert find_branches(vlm, ("vision",))
    other = double_vlm("clip")
    layers: Any = other.towers["text"].layers
    layers[1].mlp.fc2.weight = layers[0].mlp.fc2.weight
    with pytest.raises(ConfigError, match="shares its weight with"):
        find_branches(other, ("text",))


def test_hard_concrete_gates_follow_their_distribution() -> None:
    branches = find_branches(double_vlm("clip"), ("text",))
    gates = Gates(branches, "hard_concrete")
    with torch.no_grad():
        gates.values.fill_(0.4)
        draws = []
        for _ in range(4000):
            penalty = gates.draw()
            assert gates._drawn is not None
            draws.append(gates._drawn.clone())
    drawn = torch.stack(draws)
    assert float(drawn.min()) == 0.0
    assert float(drawn.max()) == 1.0
    # P(gate != 0) = P(s > 0.1 / 1.2), by the distribution function of the binary concrete
    logit = math.log((0.1 / 1.2) / (1 - 0.1 / 1.2))
    share = 1 / (1 + math.exp(logit * 2 / 3 - 0.4))
    assert float(penalty) == pytest.approx(share, abs=1e-6)
    assert float((drawn > 0).float().mean()) == pytest.approx(share, abs=0.005)


def _healed(**settings: Any) -> tuple[VLM, VLM, Any, dict[str, torch.Tensor]]:
    teacher, student = toy("llava")
    before = {name: value.detach().clone() for name, value in teacher.model.named_parameters()}
    chosen = {"max_steps": 6, "batch_size": 2, "learning_rate": 1e-3, "gate_learning_rate": 0.05}
    report = heal(
        student,
        teacher=teacher,
        data=toy_samples(6),
        collate=toy_collate("llava", teacher.model),
        **{**chosen, **settings},
    )
    return teacher, student, report, before


@pytest.mark.parametrize("kind", ["l1", "hard_concrete"])
def test_healing_learns_gates_and_leaves_the_teacher_alone(kind: str) -> None:
    teacher, student, report, before = _healed(gates=kind, gate_penalty=20.0)
    for name, value in teacher.model.named_parameters():
        assert torch.equal(value, before[name]), name
    layers = student.towers["text"].original
    table = report.gates["text"]
    assert tuple(table) == layers
    found = [gate for each in table.values() for gate in each.values()]
    assert len(found) == 2 * len(layers)
    assert max(found) < 1.0 or kind == "hard_concrete"
    assert min(found) < 1.0
    assert "gates" in report.final


def test_a_penalty_sinks_gates_and_none_leaves_them_near_one() -> None:
    mean = {}
    for penalty in (1e-6, 50.0):
        table = _healed(gates="l1", gate_penalty=penalty)[2].gates["text"]
        mean[penalty] = sum(importance(table).values()) / len(table)
    assert mean[50.0] < mean[1e-6] - 0.05
    assert _healed()[2].gates == {}


def test_gates_have_a_learning_rate_of_their_own() -> None:
    slow, fast = (
        _healed(gates="l1", gate_penalty=1e4, gate_learning_rate=rate, max_steps=1)[2].gates["text"]
        for rate in (1e-3, 1e-1)
    )
    # one step of Adam moves every gate by its rate
    for table, rate in ((slow, 1e-3), (fast, 1e-1)):
        for each in table.values():
            for gate in each.values():
                assert gate == pytest.approx(1.0 - rate, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_run_with_random_gates_resumes_to_the_same_bits(tmp_path: Path) -> None:
    assert_gated_runs_resume(tmp_path, max_steps=4, accumulation=2)
