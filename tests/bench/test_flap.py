"""FLAP: what fluctuates least goes, and biases give what it gave on average."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from methods.flap import Moments, compensate, least, look
from torch import nn

from interlace.models.sites import Site

if TYPE_CHECKING:
    from methods import Case


def site(kind: str, head_dim: int, groups: tuple[int, ...]) -> Site:
    torch.manual_seed(0)
    columns = sum(groups) * head_dim
    linear = nn.Linear(columns, 5, bias=False)
    return Site("x", kind, linear, (), linear, head_dim, groups)  # type: ignore[arg-type]


def test_moments_of_batches_are_those_of_all_tokens() -> None:
    moments = Moments(site("ffn", 1, (6,)))
    rows = 100 + torch.randn(50, 6)
    for part in rows.split([7, 1, 42]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, rows.double().mean(0))
    torch.testing.assert_close(moments.variance, rows.double().var(0))


def test_neurons_with_a_constant_activation_go_first() -> None:
    own = site("ffn", 1, (6,))
    moments = Moments(own)
    # large, but always alike
    rows = torch.randn(200, 6) * torch.tensor([3.0, 0.1, 2.0, 0.0, 4.0, 5.0]) + 50.0
    with torch.no_grad():
        own.output.weight.copy_(torch.ones(5, 6))
        # it fluctuates, but hardly anybody reads it
        own.output.weight[:, 5] = 1e-3
    moments.add(rows)
    assert least(moments, 0.5) == (1, 3, 5)


def test_heads_go_by_whole_groups() -> None:
    own = site("heads", 2, (2, 1, 3))
    moments = Moments(own)
    size = torch.tensor([1.0] * 4 + [0.1] * 2 + [2.0] * 6)
    moments.add(torch.randn(200, 12) * size)
    assert least(moments, 1 / 3) == (2,)
    assert least(moments, 2 / 3) == (0, 1, 2)


def test_the_bias_makes_up_for_the_mean() -> None:
    own = site("heads", 2, (1, 1, 1))
    moments = Moments(own)
    rows = torch.randn(64, 6) + torch.arange(6)
    moments.add(rows)
    narrowed = nn.Linear(4, 5, bias=False)
    kept = [0, 1, 4, 5]
    with torch.no_grad():
        narrowed.weight.copy_(own.output.weight[:, kept])
        compensate(narrowed, moments, (1,))
        before, after = own.output(rows), narrowed(rows[:, kept])
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=0.1)


def test_padding_is_not_looked_at(quarter: Case) -> None:
    moments = look(quarter)
    for tower in ("text", "vision"):
        counts = {own.count for own in moments[tower].values()}
        # attention and feed-forward part of every layer
        assert len(moments[tower]) == 2 * quarter.vlm.towers[tower].num_layers
        assert len(counts) == 1
    processor = quarter.vlm.processor
    words = [sample.turns[-1].text for sample in quarter.shared.calibration]
    tokens = sum(len(each) for each in processor.tokenizer(words)["input_ids"])
    assert next(iter(moments["text"].values())).count == tokens
