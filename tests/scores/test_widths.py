"""Importance of heads and neurons against what taking them out does, unit by unit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tiny
import torch
from scores.written_out import labelled

from interlace.errors import DataError
from interlace.models import VLM, family_of
from interlace.models.sites import find_sites
from interlace.scores import score
from interlace.scores.losses import SampleLoss

# of the central difference; losses come in fp32, so it must not be small
STEP = 2e-2


def opened(name: str) -> tuple[VLM, dict[str, torch.Tensor]]:
    model = tiny.TINY[name](text=3, vision=2)
    vlm = VLM(model, family_of(model), name=name)
    inputs = tiny.tiny_inputs(name, model)
    return vlm, inputs


def watched(vlm: VLM, inputs: Any, layer: int, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a projection of a text layer reads, and the hidden state its layer is given."""
    seen: list[torch.Tensor] = []
    block = vlm.towers["text"].layers[layer]
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        find_sites(block)[site].output.register_forward_pre_hook(lambda _, a: seen.append(a[0])),
    ]
    with torch.no_grad():
        vlm.model(**inputs)
    for handle in handles:
        handle.remove()
    return seen[1], seen[0]


def test_a_batch_without_images_adds_nothing_to_a_vision_tower() -> None:
    vlm, _ = opened("llava")
    inputs = labelled("llava", 2)
    plain = {name: value for name, value in inputs.items() if name != "pixel_values"}
    image = vlm.family.image_token_id(vlm.model)
    plain["input_ids"] = plain["input_ids"].masked_fill(plain["input_ids"] == image, 5)
    once, mixed = (
        score(vlm, data, metrics=("head_taylor",), towers=("vision",), progress=False)["vision"]
        for data in ([inputs], [plain, inputs])
    )
    assert mixed.importance == once.importance
    assert mixed.group_samples == once.group_samples == {"head_taylor": 2}


@pytest.mark.parametrize("metric", ["head_norm", "ffn_norm"])
def test_norms_are_means_over_real_tokens_of_what_each_unit_adds(metric: str) -> None:
    vlm, inputs = opened("llava")
    site_name = "self_attn" if metric == "head_norm" else "mlp"
    found = score(vlm, [inputs], metrics=(metric,), progress=False)
    assert found["text"].num_samples == 2
    for layer in (0, 2):
        columns, hidden = watched(vlm, inputs, layer, site_name)
        site = find_sites(vlm.towers["text"].layers[layer])[site_name]
        weight = site.output.weight.detach()
        for unit in range(0, site.num_units, 3):
            part = slice(unit * site.head_dim, (unit + 1) * site.head_dim)
            added = columns[..., part] @ weight[:, part].T
            share = added.norm(dim=-1) / hidden.norm(dim=-1)
            rows = [
                row[mask.bool()].mean()
                for row, mask in zip(share, inputs["attention_mask"], strict=True)
            ]
            expected = float(torch.stack(rows).mean())
            value = found["text"].importance[metric][site_name][layer][unit]
            assert value == pytest.approx(expected, rel=1e-4)


def scaled(row: int, part: slice, factor: float, _: Any, args: Any) -> Any:
    kept = args[0].clone()
    kept[row, :, part] *= factor
    return (kept,)


@pytest.mark.parametrize("name", ["llava", "clip", "blip_caption"])
def test_taylor_is_the_slope_of_the_loss_along_a_factor_of_the_head(name: str) -> None:
    vlm, batch = opened(name)[0], labelled(name, 2)
    found = score(vlm, [batch], metrics=("head_taylor",), progress=False)
    site_name, values = next(iter(found["text"].importance["head_taylor"].items()))
    loss = SampleLoss(vlm)
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    vlm.model.double()
    for layer, head in ((0, 1), (2, 3)):
        site = find_sites(vlm.towers["text"].layers[layer])[site_name]
        part = slice(head * site.head_dim, (head + 1) * site.head_dim)
        slopes = []
        for row in range(2):
            losses = []
            for factor in (1 + STEP, 1 - STEP):
                hook = partial(scaled, row, part, factor)
                handle = site.output.register_forward_pre_hook(hook)
                with torch.no_grad():
                    losses.append(float(loss(given).sum()))
                handle.remove()
            slopes.append(abs(losses[0] - losses[1]) / (2 * STEP))
        assert values[layer][head] == pytest.approx(sum(slopes) / 2, rel=2e-3)
    assert all(p.grad is None for p in vlm.model.parameters())


def test_taylor_does_not_depend_on_what_shares_a_batch() -> None:
    vlm, batch = opened("llava")[0], labelled("llava", 2)
    # answers of one token and of all
    batch["labels"][0, :-1] = -100
    singles = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(2)]
    apart, together = (
        score(vlm, data, metrics=("head_taylor",), progress=False)["text"].importance
        for data in (singles, [batch])
    )
    for one, other in zip(
        apart["head_taylor"]["self_attn"], together["head_taylor"]["self_attn"], strict=True
    ):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_every_unit_of_every_tower_of_every_family_is_measured() -> None:
    for name in ("blip_caption", "blip2_opt", "qwen3_vl"):
        model = tiny.TINY[name]()
        vlm = VLM(model, family_of(model), name=name)
        inputs = tiny.tiny_inputs(name, model)
        metrics = ("similarity", "head_norm", "ffn_norm")
        found = score(vlm, [inputs], metrics=metrics, progress=False)
        for tower, shape in vlm.shape().towers.items():
            importance = found[tower].importance
            for site_name, site in shape.sites.items():
                metric = "head_norm" if site.kind == "heads" else "ffn_norm"
                for layer, values in enumerate(importance[metric][site_name]):
                    assert len(values) == site.num_units(layer)
                    # a neuron behind a ReLU may be silent
                    assert not values or max(values) > 0
            assert found[tower].similarity["all"]


def test_taylor_without_answers_is_refused() -> None:
    vlm, inputs = opened("llava")
    with pytest.raises(DataError, match="needs labels"):
        score(vlm, [inputs], metrics=("head_taylor",), progress=False)
