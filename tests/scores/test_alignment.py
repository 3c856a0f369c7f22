"""Alignment against hidden states that the model itself gives out, within and between towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from scores.written_out import TOLERANCE, batch_of, opened
from tiny import IMAGE

from interlace.errors import DataError
from interlace.scores import score
from interlace.scores.alignment import Alignment
from interlace.scores.metrics import Units


def _changes(likeness: torch.Tensor) -> list[float]:
    """Mean over samples of the change from state to state, from values [S, U]."""
    return likeness.diff(dim=0).abs().mean(1).tolist()


def test_within_a_tower_it_is_the_change_of_the_cosine_of_the_means() -> None:
    vlm, batch = opened("llava"), batch_of("llava")
    scores = score(vlm, [batch], metrics=("similarity", "alignment"), progress=False)
    # h_L before the final norm, as the residual stream is scored
    states: list[torch.Tensor] = []
    layers = vlm.towers["text"].layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in layers
    ]
    hooks.append(layers[-1].register_forward_hook(lambda _, args, output: states.append(output)))
    with torch.no_grad():
        vlm.model(**batch)
    for hook in hooks:
        hook.remove()
    is_image = batch["input_ids"] == IMAGE
    is_text = (batch["attention_mask"] == 1) & ~is_image
    cosines = torch.stack(
        [
            torch.stack(
                [
                    functional.cosine_similarity(
                        state[row][is_text[row]].mean(0), state[row][is_image[row]].mean(0), dim=0
                    )
                    for row in range(len(state))
                ]
            )
            for state in states
        ]
    )
    assert scores["text"].metrics["alignment"] == pytest.approx(_changes(cosines), abs=TOLERANCE)
    alone = score(vlm, [batch], metrics=("alignment",), progress=False)
    assert alone["text"].metrics == scores["text"].metrics
    assert alone["text"].num_samples == scores["text"].num_samples == 3
    similar = score(vlm, [batch], progress=False)
    assert similar["text"].similarity == scores["text"].similarity
    assert similar["text"].alignment is None


def test_between_towers_it_is_how_alike_they_order_the_samples() -> None:
    vlm, batch = opened("clip"), batch_of("clip", 5)
    scores = score(vlm, [batch], metrics=("alignment",), progress=False)
    with torch.no_grad():
        text = vlm.model.text_model(
            batch["input_ids"], batch["attention_mask"], output_hidden_states=True
        ).hidden_states
        image = vlm.model.vision_model(
            batch["pixel_values"], output_hidden_states=True
        ).hidden_states
    mask = batch["attention_mask"][..., None]
    values = []
    for one, other in zip(text, image, strict=True):
        likeness = [
            functional.cosine_similarity(each[:, None], each[None], dim=-1)
            for each in ((one * mask).sum(1), other.sum(1))
        ]
        rows = []
        for row in range(5):
            others = [column for column in range(5) if column != row]
            pair = torch.stack([each[row, others] for each in likeness])
            rows.append(torch.corrcoef(pair)[0, 1])
        values.append(torch.stack(rows))
    expected = _changes(torch.stack(values))
    assert scores["text"].metrics["alignment"] == pytest.approx(expected, abs=1e-3)
    # both are compared with each other, at equal depth
    assert scores["vision"].metrics["alignment"] == scores["text"].metrics["alignment"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_vl", {"text": {0: "DeepStack adds", 1: "DeepStack adds"},
                      "vision": {1: "DeepStack takes", 3: "DeepStack takes", 5: "the projector"}}),
        ("llava", {"text": {}, "vision": {4: "vision_feature_layer"}}),
        ("clip", {"text": {5: "shared space"}, "vision": {5: "shared space"}}),
        ("blip_caption", {"text": {}, "vision": {5: "the text decoder"}}),
        ("blip_vqa", {"text": {}, "text_encoder": {}, "vision": {5: "the text encoder"}}),
        ("blip2_opt", {"text": {}, "vision": {5: "the Q-Former"},
                       "qformer": {7: "the projection into the language model"}}),
    ],
)  # fmt: skip
def test_where_the_modalities_meet_is_recorded_in_words(name: str, expected: Any) -> None:
    vlm = opened(name)
    scores = score(vlm, [batch_of(name, 4)], metrics=("alignment",), progress=False)
    for tower, layers in expected.items():
        assert set(scores[tower].alignment) == set(layers)
        for layer, words in layers.items():
            assert words in scores[tower].alignment[layer]
        # 6 or 8 layers: one of them changes the likeness most
        values = scores[tower].metrics["alignment"]
        most = values.index(max(values))
        carried = scores[tower].alignment_layers()
        assert set(carried) == {*layers, most}
        assert f"(rank 1 of {len(values)})" in carried[most]


def test_towers_that_cannot_be_compared_have_a_note() -> None:
    vlm = opened("clip")
    few = score(vlm, [batch_of("clip", 3)], metrics=("alignment",), progress=False)
    assert few["text"].metrics == {}
    assert few["text"].notes[0].startswith("no alignment values")
    assert few["text"].num_samples == 3
    assert set(few["text"].alignment_layers()) == {5}
    one = score(
        vlm, [batch_of("clip", 4)], metrics=("alignment",), towers=("text",), progress=False
    )
    assert one["text"].metrics == {}


def test_activations_that_are_not_finite_are_located() -> None:
    meter = Alignment(2, (), whole=False)
    meter.start()
    meter.begin_run(Units(torch.tensor([0, 0, 1, 1, -1]), torch.tensor([0, 1, 0, 1, 0]), 2))
    states = [torch.randn(5, 4) for _ in range(3)]
    states[0][4] = float("nan")
    states[1][2, 1] = float("inf")
    for index, state in enumerate(states):
        meter.state(index, state)
    meter.end_run()
    bad = meter.finish()
    assert bad is not None
    assert (bad.state, bad.unit, bad.num_units) == (1, 1, 2)
    batch = batch_of("llava")
    batch["pixel_values"] = batch["pixel_values"] * float("nan")
    with pytest.raises(DataError, match="the input of layer 0 of the tower 'vision'"):
        score(opened("llava"), [batch], metrics=("alignment",), progress=False)
