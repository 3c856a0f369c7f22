"""head_obs and ffn_obs: what they weigh, what they find, and that plans can go by them."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scores.written_out import labelled, opened
from tiny import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import interlace as il
from interlace.errors import ConfigError, DataError
from interlace.models import fisher
from interlace.models.sites import find_sites
from interlace.scores import obs, score
from interlace.scores.metrics import Units
from interlace.surgery import prune

BOTH = ("head_obs", "ffn_obs")


def _ffn(vlm: Any, layer: int) -> Any:
    return find_sites(vlm.towers["text"].layers[layer])["mlp"]


def _width(vlm: Any) -> int:
    return int(_ffn(vlm, 0).output.out_features)


def _hooks(vlm: Any) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules()]


@pytest.mark.parametrize("name", TINY)
def test_every_unit_of_every_family_has_a_finite_price(name: str) -> None:
    vlm = opened(name)
    before = {key: value.clone() for key, value in vlm.model.state_dict().items()}
    batch = labelled(name, 2)
    with torch.no_grad():
        # transformers sets hooks of its own when states are first asked for
        vlm.model(**batch)
    hooks = _hooks(vlm)
    scores = score(vlm, [batch], metrics=BOTH, progress=False)
    assert set(scores.towers) == set(vlm.towers)
    kinds = {"heads": "head_obs", "ffn": "ffn_obs"}
    for tower in vlm.towers.values():
        found = scores[tower.name]
        for position, layer in enumerate(tower.layers):
            for place, site in find_sites(layer).items():
                if site.groups:
                    values = found.importance[kinds[site.kind]][place][position]
                    assert len(values) == site.num_units
                    assert all(0 <= value < float("inf") for value in values)
        assert set(found.group_samples.values()) == {found.num_samples}
    assert all(torch.equal(before[key], value) for key, value in vlm.model.state_dict().items())
    assert _hooks(vlm) == hooks


def test_a_price_is_the_divergence_that_is_left_by_the_best_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first neuron to go, against a least squares of its own, charged by the model itself."""
    monkeypatch.setattr(fisher, "_DRAWS", 64)
    # a model of its own: others read the shared one in fp32
    vlm, batch = copy.deepcopy(opened("llava")), labelled("llava", 2)
    vlm.model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    values = score(vlm, [batch], metrics=("ffn_obs",), progress=False)["text"]
    layer = 1
    site = _ffn(vlm, layer)
    neuron = min(range(site.num_units), key=values.importance["ffn_obs"]["mlp"][layer].__getitem__)
    seen: list[torch.Tensor] = []
    hook = site.output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        vlm.model(**batch)
    hook.remove()
    real = batch["attention_mask"].bool()
    columns = seen[0][real]
    kept = [each for each in range(site.num_units) if each != neuron]
    # more neurons than tokens: the others make up for it altogether
    assert len(columns) < site.num_units
    left = torch.linalg.lstsq(columns[:, kept], columns[:, neuron : neuron + 1], driver="gelsd")
    rest = columns[:, kept] @ left.solution - columns[:, neuron : neuron + 1]
    assert float(rest.abs().max()) < 1e-8
    assert values.importance["ffn_obs"]["mlp"][layer][neuron] < 1e-3 * max(
        values.importance["ffn_obs"]["mlp"][layer]
    )


@pytest.mark.parametrize("name", ["qwen3_vl", "clip"])
def test_what_fits_into_memory_at_a_time_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, batches = opened(name), [labelled(name, 2), labelled(name, 3)]
    whole = score(vlm, batches, metrics=BOTH, progress=False)
    # less than a site, and two or three of them
    for room in (1, 50_000):
        monkeypatch.setattr(obs, "_LOT", room)
        parts = score(vlm, batches, metrics=BOTH, progress=False)
        for tower in whole.towers:
            assert parts[tower].importance == whole[tower].importance
            assert parts[tower].group_samples == whole[tower].group_samples


class _Matrices(TorchDispatchMode):
    """Counts the square matrices of doubles that are alive at once, at most."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        alive = {
            each.untyped_storage().data_ptr()
            for each in gc.get_objects()
            if type(each) is torch.Tensor
            and each.dtype == torch.float64
            and each.shape == (self.size, self.size)
        }
        self.most = max(self.most, len(alive))
        return made


@pytest.mark.parametrize("size", [1, 4])
def test_pricing_holds_three_matrices_of_doubles(size: int) -> None:
    site: Any = SimpleNamespace(output=torch.nn.Linear(24, 6), head_dim=size)
    squares = torch.eye(24)
    # old objects are left out of the count
    gc.freeze()
    try:
        with _Matrices(24) as matrices:
            found = obs._priced(site, squares, torch.eye(6))
    finally:
        gc.unfreeze()
    assert len(found) == 24 // size
    # torch takes one more while it inverts
    assert matrices.most == 3


def test_lots_hold_what_fits_and_no_less_than_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    sites: Any = {
        number: SimpleNamespace(output=SimpleNamespace(in_features=features))
        for number, features in enumerate([4, 4, 2, 8, 2, 2, 2])
    }
    monkeypatch.setattr(obs, "_LOT", 144)
    assert [list(lot) for lot in obs._lots(sites)] == [[0, 1, 2], [3], [4, 5, 6]]
    assert obs._lots({}) == []


def test_moments_have_the_traces_of_their_states_and_the_draws_of_their_seed() -> None:
    vlm, batch = opened("qwen3_vl"), labelled("qwen3_vl", 2)
    ask = fisher.Fisher(vlm)
    width = _width(vlm)
    moments = {("text", state): torch.zeros(width, width) for state in (1, 3)}
    traces = ask.traces(batch, ["text"], moments, seed=3)["text"]
    for (_, state), moment in moments.items():
        total = sum(float(each.sum()) for each in traces[state])
        assert float(moment.trace()) == pytest.approx(total, rel=1e-4)
        assert torch.allclose(moment, moment.T, rtol=1e-4, atol=1e-7)
    again = ask.traces(batch, ["text"], seed=3)["text"]
    assert all(torch.equal(a, b) for s in traces for a, b in zip(traces[s], again[s], strict=True))


def test_tokens_of_a_sample_weigh_one_together_half_alike_and_half_by_their_trace() -> None:
    unit = torch.tensor([0, 0, 0, 1, 1, -1, -1])
    modality = torch.tensor([0, 1, 1, 0, 0, 0, 0])
    trace = torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = obs._weights(Units(unit, modality, 2), trace)
    # half of 1/2, 1/4, 1/4, and half of (3 / 2, 1 / 4, 0) / (7 / 4)
    first = [0.25 + 1.5 / 3.5, 0.125 + 0.25 / 3.5, 0.125]
    assert found.tolist() == pytest.approx([*first, 0.5, 0.5, 0.0, 0.0])


def test_of_two_neurons_that_say_the_same_one_is_nearly_free() -> None:
    vlm = opened("llava")
    site = _ffn(vlm, 1)
    with torch.no_grad():
        for each in site.inputs:
            each.weight[5] = each.weight[2]
        # both matter by their norm
        site.output.weight[:, (2, 5)] *= 4
    data = labelled("llava", 24)
    found = score(vlm, [data], metrics=("ffn_obs", "ffn_norm"), progress=False)["text"].importance
    obs, norm = (found[name]["mlp"][1] for name in ("ffn_obs", "ffn_norm"))
    first = min(range(len(obs)), key=obs.__getitem__)
    assert first in (2, 5)
    assert sorted(norm)[-2:] == sorted([norm[2], norm[5]])
    # the one that is left carries both
    other = 7 - first
    assert obs[other] > sorted(obs)[len(obs) // 2]


def test_plans_go_by_them_and_what_they_leave_diverges_less_once_it_is_refitted() -> None:
    vlm = il.open_model("bundled:qwen3-vl", dtype="float32", device="cpu")
    data = il.samples("scenes", count=96, seed=5, processor=vlm.processor)
    metrics = ("head_norm", "ffn_norm", *BOTH)
    scores = il.score(vlm, data[:64], metrics=metrics, towers=("text",), progress=False)
    loss: Any = il.layer_loss(vlm, data, bridges="fold", token_weights="fisher")
    plans = {
        kind: il.make_plan(
            scores,
            towers=("text",),
            heads=0.5,
            ffn=0.5,
            width_metrics={"heads": f"head_{kind}", "ffn": f"ffn_{kind}"},
        )
        for kind in ("norm", "obs")
    }
    assert plans["norm"].towers != plans["obs"].towers
    assert loss.of_plan(plans["obs"]) < loss.of_plan(plans["norm"])
    prune(vlm, plans["obs"])


def test_what_cannot_be_asked_is_refused() -> None:
    vlm, batch = opened("llava"), labelled("llava", 2)
    plain = {key: value for key, value in batch.items() if key != "labels"}
    with pytest.raises(DataError):
        score(vlm, [plain], metrics=("ffn_obs",), progress=False)
    broken = copy.deepcopy(vlm)
    with torch.no_grad():
        _ffn(broken, 1).output.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="finite"):
        score(broken, [batch], metrics=("ffn_obs",), progress=False)
    clip = opened("clip")
    data = il.samples("scenes", count=3, seed=0, tasks=("retrieval",))
    with pytest.raises(ConfigError):
        score(clip, list(data), metrics=("ffn_obs",), batch_size=1, progress=False)
