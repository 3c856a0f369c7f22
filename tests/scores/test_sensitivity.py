"""Taylor sensitivity against autograd by hand; finite differences where they are exact."""

from __future__ import annotations

import pytest
import torch
from scores.written_out import labelled, one_by_one, opened
from torch import nn

from interlace.errors import ConfigError
from interlace.scores import score
from interlace.scores.losses import SampleLoss
from interlace.scores.sensitivity import block_weights
from interlace.scores.zeroth_order import directional_derivative


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """The matrices and norm gains of the tiny models."""
    return [p for name, p in layer.named_parameters() if name.endswith("weight")]


@pytest.mark.parametrize("name", ["qwen3_vl", "clip"])
def test_taylor_is_the_gradient_times_the_weight(name: str) -> None:
    vlm = opened(name)
    batches = [labelled(name, 3), labelled(name, 2)]
    kept = next(vlm.model.parameters())
    kept.grad = torch.ones_like(kept)
    flags = [parameter.requires_grad for parameter in vlm.model.parameters()]
    scores = score(vlm, batches, metrics=("sensitivity",), progress=False)
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert [parameter.requires_grad for parameter in vlm.model.parameters()] == flags
    assert all(p.grad is None for p in vlm.model.parameters() if p is not kept)
    kept.grad = None
    for tower_name, tower in vlm.towers.items():
        for number, layer in enumerate(tower.layers):
            weights = _weights(layer)
            assert {id(p) for p in block_weights(layer, "")} == {id(p) for p in weights}
            expected = 0.0
            for batch, share in zip(batches, (3 / 5, 2 / 5), strict=True):
                loss = SampleLoss(vlm)(batch).mean()
                gradients = torch.autograd.grad(loss, weights)
                products = zip(weights, gradients, strict=True)
                expected += share * sum(float((w.detach() * g).abs().sum()) for w, g in products)
            found = scores[tower_name].metrics["sensitivity"][number]
            assert found == pytest.approx(expected, rel=1e-4)


def test_finite_differences_are_exact_for_a_linear_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    slopes = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64)
    before = weight.detach().clone()
    memory = weight.data_ptr()

    def loss() -> torch.Tensor:
        return (slopes * weight).sum((1, 2))

    found = []
    with torch.no_grad():
        for seed in range(400):
            coarse, fine = (
                directional_derivative([weight], loss, eps=eps, seed=seed) for eps in (0.5, 1e-2)
            )
            # whatever the step: no higher order to be wrong by
            torch.testing.assert_close(coarse, fine, rtol=1e-9, atol=1e-9)
            found.append(fine)
    assert torch.equal(weight.data, before)
    assert weight.data_ptr() == memory
    # a direction is a vector of signs, so the derivative is sum of +- w g
    products = (before * slopes).flatten(1)
    reachable = products.abs().sum(1)
    assert bool((torch.stack(found).abs() <= reachable + 1e-9).all())
    # and its root mean square the 2-norm of w g, up to chance
    spread = torch.stack(found).square().mean(0).sqrt()
    torch.testing.assert_close(spread, products.norm(dim=1), rtol=0.12, atol=0)


def test_zeroth_order_follows_the_directional_derivative_of_autograd() -> None:
    vlm, batch = opened("qwen3_vl"), labelled("qwen3_vl")
    layer = vlm.towers["text"].layers[4]
    weights = block_weights(layer, "")
    loss = SampleLoss(vlm)
    losses = loss(batch)
    gradients = [torch.autograd.grad(each, weights, retain_graph=True) for each in losses]
    found, expected = [], []
    for seed in range(6):
        with torch.no_grad():
            found.append(directional_derivative(weights, lambda: loss(batch), eps=1e-3, seed=seed))
            # the direction itself: what the weights are moved by
            probe = [nn.Parameter(w.detach().clone()) for w in weights]
            moved = directional_derivative(
                probe,
                lambda probe=probe: torch.cat([p.flatten() for p in probe]),
                eps=0.5,
                seed=seed,
            )
        own = [torch.cat([g.flatten() for g in each]).double() @ moved for each in gradients]
        expected.append(torch.stack(own))
    one, other = torch.stack(found).flatten(), torch.stack(expected).flatten()
    assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) > 0.999
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


def test_zeroth_order_scores_estimate_the_norm_of_the_gradient_times_the_weight() -> None:
    vlm, batch = opened("clip"), labelled("clip")
    directions = 16
    before = {name: each.clone() for name, each in vlm.model.state_dict().items()}
    scores = score(
        vlm,
        [batch],
        metrics=("sensitivity_zeroth_order",),
        num_directions=directions,
        progress=False,
    )
    stated = {"num_directions": directions, "seed": 0, "eps": 1e-3}
    assert scores.settings["zeroth_order"] == stated
    after = vlm.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    losses = SampleLoss(vlm)(batch)
    # a root mean square of R draws of a normal variable is off by one part in sqrt(2 R)
    chance = 1 / (2 * directions) ** 0.5
    for tower_name, tower in vlm.towers.items():
        ratios = []
        for number, layer in enumerate(tower.layers):
            weights = block_weights(layer, "")
            norms = []
            for loss in losses:
                gradients = torch.autograd.grad(loss, weights, retain_graph=True)
                products = zip(weights, gradients, strict=True)
                norms.append(torch.cat([(w.detach() * g).flatten() for w, g in products]).norm())
            found = scores[tower_name].metrics["sensitivity_zeroth_order"][number]
            ratios.append(found / float(torch.stack(norms).mean()))
        assert max(abs(ratio - 1) for ratio in ratios) < 4 * chance


def test_samples_do_not_depend_on_their_batch_without_gradients() -> None:
    vlm, batch = opened("qwen3_vl"), labelled("qwen3_vl")
    arguments = {"metrics": ("sensitivity_zeroth_order",), "num_directions": 2, "progress": False}
    together = score(vlm, [batch], towers=("text",), **arguments)["text"]
    apart = score(vlm, one_by_one(batch), towers=("text",), **arguments)["text"]
    one, other = (each.metrics["sensitivity_zeroth_order"] for each in (together, apart))
    assert one == pytest.approx(other, rel=1e-2)


def test_models_and_arguments_without_a_sensitivity_are_refused() -> None:
    vlm, batch = opened("clip"), labelled("clip")
    with pytest.raises(ConfigError, match="num_directions is 0"):
        score(vlm, [batch], num_directions=0, progress=False)
    quantised = nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"Layer 3.*no weights in floating point"):
        block_weights(quantised, "Layer 3 of the tower 'text'")
