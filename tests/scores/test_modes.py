"""Scores under the caller's inference mode, and of a model in bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from scores.written_out import labelled, opened
from tiny import llava

from interlace.errors import ConfigError
from interlace.models import VLM, family_of
from interlace.scores import METRICS, score
from interlace.scores.metrics import WIDTH_METRICS

# bfloat16 keeps 8 bits, and the weights are the same in both models. A cosine is a mean over many
# tokens, so it is off by less than one rounding; a loss by a few of those of the logits, and what
# is made of it by that share of the largest value of the tower.
COSINE_TOLERANCE = 2.0**-8
LOSS_TOLERANCE = 2.0**-4


def test_inference_mode_of_the_caller_changes_no_score() -> None:
    vlm, batch = opened("llava"), labelled("llava", 2)
    modes = []

    def measure(tower: str, gone: tuple[int, ...]) -> float:
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return 1.0 / (1 + sum(gone))

    def scored() -> dict[str, object]:
        found = score(
            vlm,
            [batch],
            metrics=(*METRICS, *WIDTH_METRICS),
            num_directions=1,
            measure=measure,
            progress=False,
        )
        return dict(found.towers)

    plain = scored()
    modes.clear()
    with torch.inference_mode():
        # tensors that count no writes and cannot be saved for a backward pass
        batch = {key: value.clone() for key, value in batch.items()}
        assert scored() == plain
        assert torch.is_inference_mode_enabled()
    assert set(modes) == {(False, False)}
    assert scored() == plain
    assert torch.is_grad_enabled()


def test_weights_made_in_inference_mode_allow_no_gradients_and_the_metrics_say_so() -> None:
    batch = labelled("llava", 2)
    with torch.inference_mode():
        model = llava(text=3, vision=3)
    vlm = VLM(model, family_of(model), name="frozen")
    for metric in ("sensitivity", "head_taylor"):
        with pytest.raises(ConfigError, match=f"'{metric}' cannot be scored"):
            score(vlm, [batch], metrics=(metric,), progress=False)
    own = llava(text=3, vision=3)
    usual = VLM(own, family_of(own), name="usual")
    metrics = ("similarity", "relevance", "mlp_relevance", "ffn_norm")
    found, expected = (
        score(each, [batch], metrics=metrics, progress=False) for each in (vlm, usual)
    )
    assert found.towers == expected.towers


def test_bfloat16_scores_as_float32_does_up_to_its_rounding() -> None:
    model = copy.deepcopy(opened("llava").model).bfloat16()
    batch = labelled("llava")
    metrics = ("similarity", "relevance", "mlp_relevance", "head_taylor", "sensitivity")
    half = score(VLM(model, family_of(model)), [batch], metrics=metrics, progress=False)
    # the same weights, already rounded
    model.float()
    full = score(VLM(model, family_of(model)), [batch], metrics=metrics, progress=False)
    for tower in ("text", "vision"):
        for pack, values in full[tower].similarity["all"].items():
            assert half[tower].similarity["all"][pack] == pytest.approx(
                values, abs=COSINE_TOLERANCE
            )
        pairs = [
            (values, half[tower].metrics[name]) for name, values in full[tower].metrics.items()
        ]
        layers = (each[tower].importance["head_taylor"]["self_attn"] for each in (full, half))
        pairs.append(tuple(sum(each, ()) for each in layers))
        assert len(pairs) == 4
        for values, rounded in pairs:
            largest = max(map(abs, values))
            assert largest > 0
            assert rounded == pytest.approx(values, abs=LOSS_TOLERANCE * largest)
