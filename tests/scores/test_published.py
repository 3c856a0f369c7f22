"""The scores are those of the published procedure, on the states that the layers are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from scores.written_out import TOLERANCE, batch_of, one_by_one, opened, published
from tiny import IMAGE, qwen3_vl

from interlace.models import VLM, family_of
from interlace.nn.cache_memory import CACHE
from interlace.scores import score


def near(one: Any, other: Any) -> Any:
    return [*map(float, one)] == pytest.approx([*map(float, other)], abs=TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_equals_the_published_procedure(name: str) -> None:
    vlm, batch = opened(name), batch_of(name)
    scores = score(vlm, [batch], towers=("text",), progress=False)["text"]
    for pack in (1, 2, 3):
        assert near(scores.packs(pack), published(vlm.model, one_by_one(batch), pack))
    assert scores.num_samples == 3


def test_deepstack_features_belong_to_the_state_that_the_next_layer_sees() -> None:
    vlm, batch = opened("qwen3_vl"), batch_of("qwen3_vl")
    layers = vlm.towers["text"].layers
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for layer in layers
    ]
    sums = torch.zeros(len(layers) - 1, dtype=torch.float64)
    vision = torch.zeros_like(sums)
    singles = one_by_one(batch)
    for single in singles:
        seen.clear()
        with torch.no_grad():
            vlm.model(**single)
        image = single["input_ids"][0] == IMAGE
        for i in range(len(layers) - 1):
            cosine = functional.cosine_similarity(seen[i], seen[i + 1], dim=1)
            sums[i] += cosine.mean() / len(singles)
            vision[i] += cosine[image].mean() / len(singles)
    for hook in hooks:
        hook.remove()
    scores = score(vlm, [batch], progress=False)["text"]
    assert near(scores.packs(1), sums)
    assert near(scores.packs(1, "vision"), vision)
    # transformers records layer outputs from before the features of two vision layers are added
    # to the outputs of layers 0 and 1; only the states behind them are alike
    theirs = published(vlm.model, singles, 1)
    assert abs(theirs[0] - scores.packs(1)[0]) > 1e-4
    assert near(scores.packs(1)[3:], theirs[3:])


def test_the_published_end_of_the_stack_is_not_scored_but_kept_as_tail() -> None:
    vlm = opened("llava")
    tower = vlm.towers["text"]
    ends: list[torch.Tensor] = []
    hook = tower.layers[-1].register_forward_hook(
        lambda _, args, output: ends.extend((args[0], output))
    )
    batch = one_by_one(batch_of("llava"))[0]
    with torch.no_grad():
        vlm.model(**batch)
    hook.remove()
    expected = functional.cosine_similarity(ends[0][0], ends[1][0], dim=1).mean().item()
    scores = score(vlm, [batch], progress=False)["text"]
    assert [len(scores.packs(pack)) for pack in (1, 2, 3)] == [7, 6, 5]
    assert scores.tail["all"][1] == pytest.approx(expected, abs=TOLERANCE)


def test_a_batch_is_one_forward_pass_without_cache_and_leaves_the_model_as_it_was() -> None:
    model = qwen3_vl(seed=3)
    vlm = VLM(model, family_of(model))
    calls: list[Any] = []
    hook = (
        vlm.towers["text"]
        .layers[0]
        .register_forward_hook(
            lambda _, args, kwargs, out: calls.append((model.training, kwargs[CACHE])),
            with_kwargs=True,
        )
    )
    model.train()
    model.model.visual.eval()
    batch = batch_of("qwen3_vl")
    before = vlm.fingerprint
    score(vlm, [batch, batch], progress=False)
    hook.remove()
    assert calls == [(False, None)] * 2
    assert model.training
    assert not model.model.visual.training
    assert model.config.text_config.use_cache
    assert vlm.fingerprint == before
    assert not any(layer._forward_pre_hooks for layer in vlm.towers["text"].layers)


def test_the_record_says_what_it_was_made_from() -> None:
    vlm = opened("blip2_opt")
    scores = score(vlm, [batch_of("blip2_opt")], packs=(2,), progress=False)
    assert scores.inputs["model"] == vlm.fingerprint
    assert scores.shape == vlm.shape()
    assert scores["qformer"].cross_attention_layers == (0, 2, 4, 6)
    assert scores["text"].pinned == vlm.towers["text"].pinned
    assert scores["text"].num_tokens == {"all": 32, "text": 17, "vision": 15}
    assert scores["vision"].similarity.keys() == {"all", "vision"}
    assert type(scores).from_json(scores.to_json()) == scores
