from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from interlace.data.samples import samples
from interlace.errors import ConfigError, DataError
from interlace.evaluate import evaluate, generate
from interlace.evaluate._common import Options
from interlace.evaluate.generate import generate_texts
from interlace.models import VLM

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("qwen3_vl", "vqa"),
        ("blip_vqa", "vqa"),
        ("blip_caption", "caption"),
        ("blip2_opt", "vqa"),
        ("blip2_t5", "vqa"),
    ],
)
def test_texts_do_not_depend_on_the_batch(
    tiny_vlm: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch, name: str, task: str
) -> None:
    vlm = tiny_vlm(name)
    # random models may stop at once, and equal nothings would prove nothing
    monkeypatch.setitem(generate.GREEDY, "min_new_tokens", 5)
    pool = samples("scenes", count=12, tasks=(task,), split="test")
    by_length = {len(sample.turns[0].text.split()): sample for sample in pool}
    assert task == "caption" or len(by_length) > 1
    asked = [*by_length.values(), pool[0], pool[1]]
    alone = generate_texts(vlm, asked, Options(batch_size=1, max_new_tokens=5))
    assert generate_texts(vlm, asked, Options(batch_size=3, max_new_tokens=5)) == alone
    assert generate_texts(vlm, asked, Options(batch_size=9, max_new_tokens=5)) == alone
    assert any(alone)


def test_captions_need_no_turns(tiny_vlm: Callable[..., VLM]) -> None:
    vlm = tiny_vlm("blip2_t5")
    asked = samples("scenes", count=2, tasks=("caption",), split="test")
    bare = [replace(sample, turns=()) for sample in asked]
    options = Options(max_new_tokens=5)
    assert generate_texts(vlm, bare, options) == generate_texts(vlm, asked, options)


def test_checkpoint_settings_do_not_change_the_choice(tiny_vlm: Callable[..., VLM]) -> None:
    vlm = tiny_vlm("qwen3_vl")
    asked = samples("scenes", count=2, tasks=("vqa",), split="test")
    options = Options(max_new_tokens=6)
    greedy = generate_texts(vlm, asked, options)
    saved = vlm.model.generation_config
    vlm.model.generation_config = type(saved).from_dict(
        saved.to_dict()
        | {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "top_k": 3}
    )
    try:
        assert generate_texts(vlm, asked, options) == greedy
    finally:
        vlm.model.generation_config = saved


def test_training_modes_are_given_back(tiny_vlm: Callable[..., VLM]) -> None:
    vlm = tiny_vlm("qwen3_vl")
    asked = samples("scenes", count=1, tasks=("vqa",), split="test")
    vlm.towers["text"].layers[1].train()
    try:
        generate_texts(vlm, asked, Options(max_new_tokens=2))
        assert vlm.towers["text"].layers[1].training
        assert not vlm.towers["text"].layers[0].training
    finally:
        vlm.model.eval()


@pytest.mark.parametrize(("name", "task"), [("blip_vqa", "vqa"), ("blip_caption", "caption")])
def test_answers_may_be_as_long_as_there_are_positions(
    name: str, task: str, tiny_vlm: Callable[..., VLM]
) -> None:
    vlm = tiny_vlm(name)
    most = vlm.model.config.text_config.max_position_embeddings
    data = samples("scenes", count=2, tasks=(task,))
    with pytest.raises(ConfigError, match=f"has positions for {most} tokens only"):
        evaluate(vlm, tasks=(task,), data=data, max_new_tokens=most + 1)
    evaluate(vlm, tasks=(task,), data=data, max_new_tokens=most)


def test_models_without_text_or_processor_are_refused(tiny_vlm: Callable[..., VLM]) -> None:
    asked = samples("scenes", count=1, tasks=("vqa",), split="test")
    with pytest.raises(ConfigError, match="generates no text"):
        generate_texts(tiny_vlm("clip"), asked, Options())
    whole = tiny_vlm("qwen3_vl")
    with pytest.raises(ConfigError, match="without a processor"):
        generate_texts(VLM(whole.model, whole.family), asked, Options())


@pytest.mark.parametrize("name", ["qwen3_vl", "blip_caption", "blip_vqa", "blip2_t5"])
def test_nan_is_an_error_and_no_answer(tiny_vlm: Callable[..., VLM], name: str) -> None:
    vlm = tiny_vlm(name)
    asked = samples("scenes", count=2, tasks=("caption",), split="test")
    norm = (
        vlm.towers["text"]
        .layers[-1]
        .register_forward_hook(
            lambda *call: torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda each: each * float("nan"), call[-1]
            )
        )
    )
    with pytest.raises(DataError, match="gives NaN as logits for sample 'scenes-test"):
        generate_texts(vlm, asked, Options(max_new_tokens=3))
    norm.remove()
    generate_texts(vlm, asked, Options(max_new_tokens=3))
