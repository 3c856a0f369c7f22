"""The attention implementation "interlace" without any fused module, as transformers offers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import interlace.nn
from interlace.nn.masks import pattern_of

if TYPE_CHECKING:
    from pathlib import Path

assert interlace.nn


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next", "siglip2", "blip2_t5"])
def test_models_are_loaded_with_it(name: str, kit: Any, tmp_path: Path, route: Any) -> None:
    model = kit.build(name)
    inputs = kit.inputs(name, model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="interlace")
    exact = kit.in_fp64(model)
    truth = kit.forward(exact, kit.cast(inputs, torch.float64))
    with route():
        found = kit.forward(loaded, inputs)
    assert kit.excesses(found, kit.forward(model, inputs), truth) == []


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_sliding_windows(name: str, cache: str | None, kit: Any, route: Any) -> None:
    # the window is shorter than the prompts, and layers 4 and up have it
    model = kit.build(name, window=5)
    inputs = kit.inputs(name, model)
    exact = kit.in_fp64(model)
    truth = kit.forward(exact, kit.cast(inputs, torch.float64))
    plain = kit.forward(model, inputs)
    whole = kit.build(name)
    assert not torch.allclose(plain[".logits"], kit.forward(whole, inputs)[".logits"])
    tokens = kit.generate(model, name, cache_implementation=cache)
    model.set_attn_implementation("interlace")
    with route():
        assert kit.excesses(kit.forward(model, inputs), plain, truth) == []
        assert torch.equal(kit.generate(model, name, cache_implementation=cache), tokens)


def test_packed_sequences_do_not_see_each_other(kit: Any, route: Any) -> None:
    model = kit.build("llava").model.language_model
    ids = torch.randint(3, 100, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        apart = [model(ids[:, part]).last_hidden_state for part in (slice(0, 4), slice(4, 9))]
        model.set_attn_implementation("interlace")
        with route():
            packed = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-5, atol=1e-5)


def test_attention_weights_are_given_on_request(kit: Any) -> None:
    model = kit.build("llava")
    inputs = kit.inputs("llava", model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True)
        model.set_attn_implementation("interlace")
        found = model(**inputs, output_attentions=True)
    assert len(found.attentions) == len(plain.attentions) == 8
    real = inputs["attention_mask"].bool()
    for mine, theirs in zip(found.attentions, plain.attentions, strict=True):
        torch.testing.assert_close(mine.transpose(1, 2)[real], theirs.transpose(1, 2)[real])
    torch.testing.assert_close(found.logits[real], plain.logits[real])


def test_a_mask_that_is_copied_loses_its_lengths_and_stays_right(kit: Any, route: Any) -> None:
    model = kit.build("llava").model.language_model
    ids = torch.randint(3, 100, (2, 6))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[0, :, :, :2] = False
    assert pattern_of(mask) is None
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).last_hidden_state
        model.set_attn_implementation("interlace")
        with route():
            found = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[0, 2:], plain[0, 2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-5, atol=1e-5)


def _batched(model: Any) -> tuple[list[list[int]], set[str | None]]:
    """Tokens that continuous batching gives, and what it reports as errors."""
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, block_size=32, max_batch_tokens=32)
    found = model.generate_batch(
        [[5, 6, 7, 8], [9, 10, 11]],
        generation_config=settings,
        continuous_batching_config=small,
        progress_bar=False,
    )
    return [each.generated_tokens for each in found.values()], {e.error for e in found.values()}


def test_continuous_batching_without_a_mask_is_refused(kit: Any) -> None:
    model = kit.build("llava", text=2)
    plain, errors = _batched(model)
    assert errors == {None}
    interlace.nn.fuse(model)
    tokens, (words,) = _batched(model)
    # transformers 5.17 puts its own attention in the place of ours, which is right as well
    if words is not None:
        assert "no mask for the attention implementation 'interlace'" in words
    assert tokens == (plain if words is None else [[], []])
    tokens, (words,) = _batched(kit.narrowed("llava"))
    assert words is not None
    assert "implementation 'sdpa_kv_map'" in words or "'paged|sdpa' knows equal ones only" in words
    assert tokens == [[], []]
    model.set_attn_implementation("sdpa")
    assert _batched(model) == (plain, {None})
