from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from interlace.heal import head_terms, normalised_error, similarity_divergence
from interlace.heal.batches import REDUCED_BY, count_items, label_weights
from interlace.models.predictor import targets_of

N, D, V = 11, 6, 13


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _plain_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    p = torch.softmax(teacher / temperature, -1)
    q = torch.softmax(student / temperature, -1)
    return (p * (p.log() - q.log())).sum() * temperature**2


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_head_terms_equal_the_plain_computation(chunk_tokens: int, temperature: float) -> None:
    weight, teacher_weight = _random(V, D, seed=1), _random(V, D + 2, seed=2)
    hidden, teacher = _random(N, D, seed=3).requires_grad_(), _random(N, D + 2, seed=4)
    targets = torch.arange(N) % V
    sizes: list[int] = []

    def head(piece: torch.Tensor) -> torch.Tensor:
        sizes.append(len(piece))
        return piece @ weight.T

    total, entropy, apart = head_terms(
        hidden,
        targets,
        head,
        teacher_hidden=teacher,
        teacher_head=lambda piece: piece @ teacher_weight.T,
        ce_weight=0.5,
        kl_weight=2.0,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    (3 * total).backward()
    found, hidden.grad = hidden.grad, None

    logits = hidden @ weight.T
    plain_entropy = functional.cross_entropy(logits, targets, reduction="sum")
    plain_apart = _plain_kl(logits, teacher @ teacher_weight.T, temperature)
    (3 * (0.5 * plain_entropy + 2.0 * plain_apart)).backward()
    torch.testing.assert_close(entropy, plain_entropy.detach())
    torch.testing.assert_close(apart, plain_apart.detach())
    torch.testing.assert_close(total, 0.5 * entropy + 2.0 * apart)
    torch.testing.assert_close(found, hidden.grad)
    assert max(sizes) <= chunk_tokens
    assert not weight.requires_grad


@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_tokens_may_count_differently(chunk_tokens: int) -> None:
    weight, teacher_weight = _random(V, D, seed=1), _random(V, D, seed=2)
    hidden, teacher = _random(N, D, seed=3).requires_grad_(), _random(N, D, seed=4)
    targets, counts = torch.arange(N) % V, torch.linspace(0.0, 2.0, N, dtype=torch.float64)
    total, entropy, apart = head_terms(
        hidden,
        targets,
        lambda piece: piece @ weight.T,
        teacher_hidden=teacher,
        teacher_head=lambda piece: piece @ teacher_weight.T,
        token_weights=counts,
        chunk_tokens=chunk_tokens,
    )
    total.backward()
    found, hidden.grad = hidden.grad, None
    logits, other = hidden @ weight.T, teacher @ teacher_weight.T
    plain = functional.cross_entropy(logits, targets, reduction="none") @ counts
    kls = torch.stack([_plain_kl(logits[i], other[i], 1.0) for i in range(N)])
    (plain + kls @ counts).backward()
    torch.testing.assert_close(entropy, plain.detach())
    torch.testing.assert_close(apart, (kls @ counts).detach())
    torch.testing.assert_close(found, hidden.grad)


@pytest.mark.parametrize(("reduction", "power"), [("sample", -1.0), ("square", -0.5)])
def test_label_weights_and_what_they_are_divided_by(reduction: str, power: float) -> None:
    labels = torch.tensor([[-100, 5, -100, -100], [-100, 5, 6, 7], [-100, -100, -100, -100]])
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": labels}
    counted = targets_of(labels, shift=True) != -100
    weights = label_weights(counted, reduction)
    expected = torch.tensor([1.0, 3.0, 3.0, 3.0]) ** power
    torch.testing.assert_close(weights, expected)
    counts = count_items(batch, has_decoder=False, shift=True)
    assert counts[REDUCED_BY[reduction]] == pytest.approx(float(expected.sum()))
    assert label_weights(counted, "token") is None
    assert counts[REDUCED_BY["token"]] == 4.0


def test_head_terms_of_no_tokens_are_zero() -> None:
    hidden = _random(0, D).requires_grad_()
    total, entropy, apart = head_terms(hidden, torch.zeros(0, dtype=torch.long), lambda x: x)
    total.backward()
    assert total.item() == entropy.item() == apart.item() == 0.0


def test_head_terms_in_half_precision_are_summed_in_fp32() -> None:
    hidden = _random(N, D).bfloat16().requires_grad_()
    weight = _random(V, D, seed=1).bfloat16()
    total, *_ = head_terms(hidden, torch.arange(N) % V, lambda x: x @ weight.T, chunk_tokens=4)
    total.backward()
    assert total.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_normalised_error_equals_its_definition(chunk_tokens: int) -> None:
    student, teacher = _random(2, 5, D).requires_grad_(), _random(2, 5, D, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    error = normalised_error(student, teacher, mask, chunk_tokens=chunk_tokens)
    (2 * error).backward()
    found, student.grad = student.grad, None
    per_token = (student - teacher).square().sum(-1) / teacher.square().sum(-1)
    plain = per_token[mask].sum()
    (2 * plain).backward()
    torch.testing.assert_close(error, plain.detach())
    torch.testing.assert_close(found, student.grad)
    assert found is not None
    assert found[0, 3:].abs().max() == 0


def test_similarity_divergence_compares_rows_and_columns() -> None:
    student, teacher = _random(4, 4), _random(4, 4, seed=1)
    plain = (_plain_kl(student, teacher, 2.0) + _plain_kl(student.T, teacher.T, 2.0)) / 2
    torch.testing.assert_close(similarity_divergence(student, teacher, 2.0), plain)
    assert similarity_divergence(teacher, teacher, 1.0).item() == pytest.approx(0, abs=1e-12)
