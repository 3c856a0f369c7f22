"""Relevance by replay is that of a plain sweep, for every family; parts of layers by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from scores.written_out import TOLERANCE, labelled, opened, skipped
from tiny import TINY, llava
from torch import nn

from interlace._torch_utils import inference, without_cache
from interlace.errors import ConfigError, DataError
from interlace.models import VLM, family_of
from interlace.scores import score
from interlace.scores.losses import SampleLoss
from interlace.scores.replay import Replay

if TYPE_CHECKING:
    from interlace.models.handle import Tower

# The towers that read the output of another.
READERS = {
    "vision": ("qformer", "text_encoder", "text"),
    "qformer": ("text_encoder", "text"),
    "text_encoder": ("text",),
    "text": (),
}


def plain_sweep(vlm: VLM, tower: Tower, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The losses [B] without each layer, every one in a whole forward pass."""
    loss, found = SampleLoss(vlm), []
    for layer in tower.layers:
        with skipped(layer):
            found.append(loss(batch))
    return found


@pytest.mark.parametrize("name", TINY)
def test_replay_equals_the_plain_sweep_bit_for_bit_at_about_half_the_cost(name: str) -> None:
    vlm, batch = opened(name), labelled(name)
    loss = SampleLoss(vlm)
    depths = {each: tower.num_layers for each, tower in vlm.towers.items()}
    with inference(vlm.model), without_cache(vlm.model), Replay(vlm.towers) as replay:

        def run() -> torch.Tensor:
            return loss(batch)

        recorded = replay.record(run)
        assert replay.num_computed == sum(depths.values())
        replay.verify(run)
        assert replay.refusals == {}
        assert replay.num_computed == 0
        found: dict[str, list[torch.Tensor]] = {}
        for each, depth in depths.items():
            computed, found[each] = 0, []
            for layer in range(depth):
                found[each].append(replay.changed(each, layer, None, run))
                computed += replay.num_computed
            own = depth * (depth - 1) // 2
            behind = 0
            if vlm.family.objective != "contrastive":
                behind = depth * sum(depths.get(reader, 0) for reader in READERS[each])
            # less where layers stand behind the one that is read (vision_feature_layer)
            unread = len(vlm.towers[each].unread)
            assert computed == own + behind - (8 * unread if behind else 0)
    assert all("forward" not in vars(m) for t in vlm.towers.values() for m in t.layers)
    with inference(vlm.model), without_cache(vlm.model):
        assert torch.equal(recorded, loss(batch))
        for each, tower in vlm.towers.items():
            plain = plain_sweep(vlm, tower, batch)
            assert all(map(torch.equal, found[each], plain))
    scores = score(vlm, [batch], metrics=("relevance",), progress=False)
    for each, losses in found.items():
        rises = [float((without.double() - recorded.double()).mean()) for without in losses]
        assert scores[each].metrics["relevance"] == pytest.approx(rises, abs=1e-12)
        assert scores[each].notes == ()


def test_layers_that_cannot_be_replayed_are_swept_in_whole_passes() -> None:
    model = llava()
    vlm = VLM(model, family_of(model))
    batch = labelled("llava")

    def write(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.mul_(1.01)

    # a hook runs behind the layer, so it writes into what was recorded
    model.model.language_model.layers[3].register_forward_hook(write)
    scores = score(vlm, [batch], metrics=("relevance",), progress=False)
    (note,) = scores["text"].notes
    assert note.startswith("no replay: its layers are not given the same")
    assert scores["vision"].notes == ()
    with inference(model), without_cache(model):
        base = SampleLoss(vlm)(batch).double()
        for tower in ("text", "vision"):
            plain = plain_sweep(vlm, vlm.towers[tower], batch)
            rises = [float((each.double() - base).mean()) for each in plain]
            assert scores[tower].metrics["relevance"] == pytest.approx(rises, abs=1e-12)


def _zeroed(*linear: nn.Linear) -> dict[nn.Parameter, torch.Tensor]:
    own = {parameter: parameter.data for each in linear for parameter in each.parameters()}
    for parameter in own:
        parameter.data = torch.zeros_like(parameter.data)
    return own


def test_parts_are_skipped_as_if_their_last_matrix_were_zero() -> None:
    vlm, batch = opened("qwen3_vl"), labelled("qwen3_vl")
    metrics = ("attention_relevance", "mlp_relevance")
    scores = score(vlm, [batch], metrics=metrics, progress=False)
    loss = SampleLoss(vlm)
    with torch.no_grad():
        base = loss(batch).double()
        for tower, names in (("text", ("o_proj", "down_proj")), ("vision", ("proj", "linear_fc2"))):
            for number, layer in enumerate(vlm.towers[tower].layers):
                attention = layer.self_attn if tower == "text" else layer.attn
                ends = (getattr(attention, names[0]), getattr(layer.mlp, names[1]))
                for metric, end in zip(metrics, ends, strict=True):
                    own = _zeroed(end)
                    rise = float((loss(batch).double() - base).mean())
                    for parameter, data in own.items():
                        parameter.data = data
                    assert scores[tower].metrics[metric][number] == pytest.approx(
                        rise, abs=TOLERANCE
                    )


def test_both_attentions_of_a_layer_that_has_two_are_skipped_and_its_norms_stay() -> None:
    vlm, batch = opened("blip_caption"), labelled("blip_caption")
    metrics = ("attention_relevance", "mlp_relevance")
    scores = score(vlm, [batch], metrics=metrics, towers=("text",), progress=False)["text"]
    loss = SampleLoss(vlm)
    layer = vlm.towers["text"].layers[2]
    attentions = (layer.attention.output.dense, layer.crossattention.output.dense)
    with torch.no_grad():
        base = loss(batch).double()
        for metric, ends in zip(metrics, (attentions, (layer.output.dense,)), strict=True):
            own = _zeroed(*ends)
            rise = float((loss(batch).double() - base).mean())
            for parameter, data in own.items():
                parameter.data = data
            assert scores.metrics[metric][2] == pytest.approx(rise, abs=TOLERANCE)


@pytest.mark.parametrize("name", sorted(set(TINY) - {"qwen3_vl_moe", "qwen3_5_moe"}))
def test_every_family_but_those_with_experts_has_parts(name: str) -> None:
    vlm = opened(name)
    scores = score(vlm, [labelled(name, 2)], metrics=("mlp_relevance",), progress=False)
    for tower, depth in ((each, t.num_layers) for each, t in vlm.towers.items()):
        values = scores[tower].metrics["mlp_relevance"]
        assert len(values) == depth
        assert len(set(values)) > 1


def test_layers_whose_part_is_not_found_have_a_note_instead() -> None:
    class Unknown(nn.Linear):
        pass

    model = llava()
    vlm = VLM(model, family_of(model))
    vlm.towers["text"].layers[2].mlp.down_proj.__class__ = Unknown
    metrics = ("mlp_relevance", "attention_relevance")
    scores = score(vlm, [labelled("llava")], metrics=metrics, progress=False)
    assert "mlp_relevance" not in scores["text"].metrics
    assert "not found in layer 2" in scores["text"].notes[0]
    assert "attention_relevance" in scores["text"].metrics
    assert "mlp_relevance" in scores["vision"].metrics


def test_a_loss_that_breaks_without_a_layer_says_so() -> None:
    vlm, batch = opened("qwen3_vl"), labelled("qwen3_vl")
    final = vlm.model.model.language_model.norm
    calls = []

    def break_fifth(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        # recorded, verified, without the layers 0 and 1; the fifth is without layer 2
        return output / 0 if len(calls) == 5 else output

    hook = final.register_forward_hook(break_fifth)
    with pytest.raises(DataError, match="nan without layer 2 of the tower 'text'"):
        score(vlm, [batch], metrics=("relevance",), towers=("text",), progress=False)
    hook.remove()


def test_the_task_is_measured_by_calling_back() -> None:
    vlm, batch = opened("clip"), labelled("clip")
    worth = {("text", ()): 0.9, ("vision", ()): 0.9, ("text", (4,)): 0.5}
    calls: list[Any] = []

    def measure(tower: str, gone: tuple[int, ...]) -> float:
        calls.append((tower, gone))
        return worth.get((tower, gone), 0.8)

    scores = score(vlm, [batch], metrics=("task_relevance",), measure=measure, progress=False)
    values = scores["text"].metrics["task_relevance"]
    assert values == pytest.approx((0.1, 0.1, 0.1, 0.1, 0.4, 0.1))
    assert len(calls) == len(set(calls)) == 2 * (1 + 6)
    with pytest.raises(ConfigError, match="measure=callback"):
        score(vlm, [batch], metrics=("task_relevance",), progress=False)
    with pytest.raises(ConfigError, match="no metric calls it"):
        score(vlm, [batch], measure=measure, progress=False)
    with pytest.raises(DataError, match="without layer 0 of the tower 'text' is nan"):
        score(
            vlm,
            [batch],
            metrics=("task_relevance",),
            measure=lambda tower, gone: float("nan") if gone else 1.0,
            progress=False,
        )
