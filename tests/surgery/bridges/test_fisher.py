"""Token weights by the Fisher information: the traces, and what fits make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scores.written_out import batch_of, labelled, opened
from tiny import TINY

from interlace.config import PruneSettings
from interlace.data.samples import samples
from interlace.errors import ConfigError, DataError
from interlace.models import VLM, family_of, fisher, open_model
from interlace.models.fisher import TEMPERATURE, Fisher
from interlace.models.predictor import IGNORED, Predictor
from interlace.models.states import shift_input
from interlace.progressive.loss import layer_loss
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune
from interlace.surgery.bridges import calibration as calibrations
from interlace.surgery.bridges.calibration import Calibration


def _hooks(vlm: VLM) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules()]


def _exact(vlm: Any, batch: dict[str, torch.Tensor], tower: str, state: int) -> torch.Tensor:
    """The trace of every token [N], with the Jacobian of the logits written out."""
    layer, caught = vlm.towers[tower].layers[state], []

    def leaf(hidden: torch.Tensor) -> torch.Tensor:
        caught.append(hidden.detach().requires_grad_())
        return caught[0]

    hook = shift_input(layer, leaf)
    predictor = Predictor(vlm)
    if predictor.contrastive:
        rows = predictor.similarities(batch) / TEMPERATURE
        predictions = [row for each in (rows, rows.T) for row in each]
    else:
        logits, targets = predictor.answers(batch)
        predictions = list(logits[targets != IGNORED] / TEMPERATURE)
    hook.remove()
    total = torch.zeros(caught[0][..., 0].numel(), dtype=torch.float64)
    for z in predictions:
        p = z.detach().double().softmax(-1)
        (slopes,) = torch.autograd.grad(
            z, caught[0], torch.eye(len(z)), retain_graph=True, is_grads_batched=True
        )
        jacobian = slopes.double().flatten(1, -2)
        mean = torch.einsum("v,vnd->nd", p, jacobian)
        total += torch.einsum("v,vnd->n", p, jacobian.square())
        total -= mean.square().sum(-1)
    return total


@pytest.mark.parametrize(("name", "tower"), [("qwen3_vl", "text"), ("clip", "vision")])
def test_the_traces_are_those_of_the_jacobian(
    name: str, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "_DRAWS", 1000)
    vlm, batch = opened(name), labelled(name)
    found = Fisher(vlm).traces(batch, [tower])[tower]
    for state in (0, 2):
        (drawn,), exact = found[state], _exact(vlm, batch, tower, state)
        assert float(exact.max()) > 0
        assert drawn.sum() == pytest.approx(float(exact.sum()), rel=0.1)
        # a draw has about the standard deviation of a squared normal number
        assert bool(((drawn - exact).abs() <= 0.35 * exact + 1e-3 * exact.max()).all())


@pytest.mark.parametrize("name", TINY)
def test_every_state_of_every_tower_has_traces_and_the_model_stays_as_it_was(name: str) -> None:
    vlm, batch = opened(name), labelled(name)
    before = vlm.fingerprint
    trained = [each.requires_grad for each in vlm.model.parameters()]
    with torch.no_grad():
        vlm.model(**batch)
        hooks = _hooks(vlm)
        found = Fisher(vlm).traces(batch, vlm.towers)
    assert _hooks(vlm) == hooks
    assert found.keys() == vlm.towers.keys()
    for tower, states in found.items():
        assert sorted(states) == list(range(vlm.towers[tower].num_layers + 1))
        assert {len(runs) for runs in states.values()} == {1}
        assert float(states[0][0].sum()) > 0
    assert vlm.fingerprint == before
    assert trained == [each.requires_grad for each in vlm.model.parameters()]
    assert not any(each.grad is not None for each in vlm.model.parameters())


def test_no_prediction_hangs_on_padding_nor_at_the_end_on_what_predicts_nothing() -> None:
    vlm, batch = opened("qwen3_vl"), labelled("qwen3_vl")
    states = Fisher(vlm).traces(batch, ["text"])["text"]
    shape = batch["input_ids"].shape
    padded = ~batch["attention_mask"].bool()
    assert bool(padded.any())
    for (trace,) in states.values():
        assert not bool(trace.view(shape)[padded].any())
    answers = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED
    (last,) = states[vlm.towers["text"].num_layers]
    assert torch.equal(last.view(shape) > 0, answers)
    (first,) = states[0]
    assert int((first > 0).sum()) > int(answers.sum())


def test_tokens_count_by_their_traces_beside_equal_mass() -> None:
    vlm, batch = opened("qwen3_vl"), labelled("qwen3_vl")
    batch = {key: torch.cat([value] * 2) for key, value in batch.items()}
    hidden = torch.zeros(*batch["input_ids"].shape, 1)
    found = {}
    for name in ("even", "fisher"):
        calibration = Calibration(vlm, [batch], 8, token_weights=name)
        weights = calibration.survey(["text"])["text"]
        for state in (0, 3):
            weights.restart()
            found[name, state], _ = weights.of(batch, hidden, state)
    assert torch.equal(found["even", 0], found["even", 3])
    counts = found["even", 0] > 0
    for state in (0, 3):
        (trace,) = Fisher(vlm).traces(batch, ["text"])["text"][state]
        factor = trace / trace[counts].mean() + calibrations._ALIKE
        expected = found["even", state] * factor
        torch.testing.assert_close(found["fisher", state], expected)


def test_students_repaired_where_it_counts_are_nearer_to_the_whole_model() -> None:
    vlm = open_model("bundled:clip", dtype="float32")
    data = samples("scenes", count=96, seed=0, tasks=("retrieval",), processor=vlm.processor)
    apart = {
        name: layer_loss(vlm, data, bridges="refit", token_weights=name)("vision", (3, 7, 8, 9))
        for name in ("even", "fisher")
    }
    assert 0 < apart["fisher"] < 0.9 * apart["even"]


def test_the_manifest_says_by_what_tokens_counted() -> None:
    vlm = opened("qwen3_vl")
    plan = Plan({"text": TowerPlan(vlm.towers["text"].num_layers, drop=(2,))})
    data = [labelled("qwen3_vl")] * 4
    for name in ("even", "fisher"):
        student = prune(vlm, plan, bridges="refit", data=data, token_weights=name)
        settings = [b.settings for b in student.record.bridges if b.kind != "none"]
        assert settings
        expected = {None if name == "even" else name}
        assert {each.get("token_weights") for each in settings} == expected


def test_choices_that_nothing_could_follow_are_refused() -> None:
    vlm = opened("llava")
    plan = Plan({"text": TowerPlan(vlm.towers["text"].num_layers, drop=(2,))})
    with pytest.raises(ConfigError, match="Did you mean 'fisher'"):
        prune(vlm, plan, bridges="fold", token_weights="fischer")
    with pytest.raises(ConfigError, match="bridges='none' asks for none"):
        prune(vlm, plan, token_weights="fisher")
    with pytest.raises(ConfigError, match="nothing is fitted"):
        PruneSettings(token_weights="fisher", bridges={"text": "none"})
    data = [batch_of("llava")] * 2
    with pytest.raises(DataError, match="needs labels"):
        prune(vlm, plan, bridges="fold", data=data, token_weights="fisher")
    with pytest.raises(ConfigError, match="Did you mean 'even'"):
        layer_loss(vlm, [], token_weights="evn")


def test_running_out_of_memory_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    vlm = opened("llava")
    plan = Plan({"text": TowerPlan(vlm.towers["text"].num_layers, drop=(2,))})
    monkeypatch.setattr(Fisher, "traces", full)
    data = [labelled("llava")] * 2
    with pytest.raises(DataError, match=r"Lower batch_size, or take token_weights='even'"):
        prune(vlm, plan, bridges="fold", data=data, token_weights="fisher")


def test_weights_made_in_inference_mode_allow_no_gradients() -> None:
    with torch.inference_mode():
        model = TINY["llava"]()
    vlm = VLM(model, family_of(model), name="llava")
    plan = Plan({"text": TowerPlan(vlm.towers["text"].num_layers, drop=(2,))})
    with pytest.raises(ConfigError, match="token_weights='fisher' cannot be had"):
        prune(vlm, plan, bridges="fold", data=[labelled("llava")] * 2, token_weights="fisher")
