"""What is special to layer_similarity: its meaning, its groups, its refusals."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn.functional import cosine_similarity

from interlace import ops
from interlace.errors import ShapeError

BACKENDS = ["torch", "cpp"]

# the module, whose name the function hides
contract = importlib.import_module("interlace.ops.layer_similarity")


def walk(num: int = 6, tokens: int = 23, width: int = 40) -> torch.Tensor:
    return torch.randn(num, tokens, width).cumsum(0)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_offset", [None, 0, 2])
def test_is_the_sum_of_cosines_of_every_pair(backend: str, max_offset: int | None) -> None:
    hidden = walk().double() if backend == "torch" else walk()
    groups = torch.randint(-1, 3, (23,), dtype=torch.int32)
    sums, counts = ops.layer_similarity(
        hidden, groups, num_groups=3, max_offset=max_offset, backend=backend
    )
    for g in range(3):
        assert counts[g] == (groups == g).sum()
        for i in range(6):
            for j in range(6):
                pairs = cosine_similarity(hidden[i], hidden[j], dim=-1)[groups == g]
                inside = max_offset is None or abs(i - j) <= max_offset
                expected = pairs.double().sum() if inside else torch.zeros((), dtype=torch.float64)
                assert sums[g, i, j].double() == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stacked_and_listed_states_give_the_same_bits(backend: str) -> None:
    hidden, groups = walk(), torch.zeros(23, dtype=torch.int32)
    stacked, _ = ops.layer_similarity(hidden, groups, num_groups=1, backend=backend)
    listed, _ = ops.layer_similarity(
        [h.clone() for h in hidden], groups, num_groups=1, backend=backend
    )
    assert torch.equal(stacked, listed)
    assert torch.equal(stacked, stacked.mT)


def test_compiled_kernel_does_not_depend_on_the_number_of_threads() -> None:
    # wide enough that more than one thread is used
    hidden = walk(9, 300, 1500)
    groups = torch.randint(0, 4, (300,), dtype=torch.int32)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(ops.layer_similarity(hidden, groups, num_groups=4, backend="cpp")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("max_lanes", [4, 8])
@pytest.mark.parametrize("dtype", contract.OP.dtypes)
def test_variants_for_other_processors_keep_the_budget(max_lanes: int, dtype: torch.dtype) -> None:
    for sample in contract.OP.samples(torch.device("cpu"), dtype):
        hidden, *others = sample.args
        truth, counts = contract.reference([h.double() for h in hidden], *others)
        plain, _ = contract.reference(hidden, *others)
        found, found_counts = contract._cpp(hidden, *others, max_lanes=max_lanes)
        excess = contract.OP.budget.excess(found, plain, truth)
        assert excess is None, f"{sample.name}: {excess}"
        assert torch.equal(found_counts, counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_add_up_to_the_whole(backend: str) -> None:
    hidden, groups = walk(), torch.randint(0, 2, (23,), dtype=torch.int32)
    whole = ops.layer_similarity(hidden, groups, num_groups=2, backend=backend)
    parts = [
        ops.layer_similarity([h[rows] for h in hidden], groups[rows], num_groups=2, backend=backend)
        for rows in (slice(0, 9), slice(9, 23))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    assert torch.equal(parts[0][1] + parts[1][1], whole[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_have_cosine_zero(backend: str) -> None:
    hidden = walk(3, 1, 8)
    hidden[1] = 0
    sums, _ = ops.layer_similarity(hidden, int32(0), num_groups=1, backend=backend)
    assert sums[0, 1].tolist() == [0.0, 0.0, 0.0]
    assert sums[0, 0, 0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_values_show_where_they_belong_and_nowhere_else(
    backend: str, value: float
) -> None:
    hidden = walk(4, 3, 8)
    hidden[2, 1, 5] = value
    sums, _ = ops.layer_similarity(hidden, int32(0, 1, 2), num_groups=3, backend=backend)
    expected = torch.zeros(3, 4, 4, dtype=torch.bool)
    expected[1, 2, :] = expected[1, :, 2] = True
    assert torch.equal(sums.isnan(), expected)


def test_no_gradient_flows() -> None:
    hidden = walk().requires_grad_()
    sums, _ = ops.layer_similarity(hidden, torch.zeros(23, dtype=torch.int32), num_groups=1)
    assert not sums.requires_grad


def test_compiles_without_a_graph_break() -> None:
    hidden, groups = list(walk()), torch.zeros(23, dtype=torch.int32)

    def mean(hidden: list[torch.Tensor], groups: torch.Tensor) -> torch.Tensor:
        sums, counts = ops.layer_similarity(hidden, groups, num_groups=1, max_offset=3)
        return sums / counts[:, None, None]

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, groups), mean(hidden, groups))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": []}, "one or more"),
        ({"hidden": torch.zeros(5, 4)}, r"\[T, D\]"),
        ({"hidden": [torch.zeros(4, 8), torch.zeros(4, 9)]}, "State 1 is"),
        ({"hidden": [torch.zeros(4, 8), torch.zeros(4, 8).half()]}, "all must be alike"),
        ({"hidden": torch.zeros(2, 4, 8, dtype=torch.int64)}, "floating-point"),
        ({"groups": int32(0, 0, 0)}, "one group per token"),
        ({"groups": torch.zeros(4, dtype=torch.int64)}, "expected torch.int32"),
        ({"groups": int32(0, 1, 2, 3)}, "expected 0..1"),
        ({"groups": int32(0, -2, 0, 0)}, "-1 for ignored tokens"),
        ({"num_groups": -1}, "num_groups is -1"),
        ({"max_offset": 2}, r"expected 0\.\.1"),
        ({"max_offset": -1}, "max_offset is -1"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "hidden": torch.zeros(2, 4, 8),
        "groups": int32(0, 1, -1, 0),
        "num_groups": 2,
        "max_offset": None,
    }
    with pytest.raises(ShapeError, match=words):
        ops.layer_similarity(**(arguments | change))


def test_fp64_is_refused_by_the_compiled_kernel_and_served_by_torch() -> None:
    hidden, groups = walk().double(), torch.zeros(23, dtype=torch.int32)
    reasons = dict(ops.explain("layer_similarity", list(hidden), groups, 1, None))
    assert "float64" in (reasons["cpp"] or "")
    sums, _ = ops.layer_similarity(hidden, groups, num_groups=1)
    assert sums.dtype == torch.float64


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present, and interprets nothing")
@pytest.mark.parametrize("num_tokens", [1, 16, 53])
def test_triton_kernel_sorts_tokens_by_group_over_several_blocks(num_tokens: int) -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("interlace.triton_kernels.layer_similarity")
    groups = torch.randint(-1, 5, (num_tokens,), dtype=torch.int32)
    order, starts = torch.full((num_tokens,), -7, dtype=torch.int32), int32(*[-7] * 6)
    counts = torch.full((5,), -7)
    num_blocks = -(-num_tokens // 16)
    kernels.order_kernel[(num_blocks * 5,)](groups, order, starts, counts, num_tokens, 5, BLOCK=16)
    num_valid = int((groups >= 0).sum())
    expected = torch.argsort(groups, stable=True)[num_tokens - num_valid :]
    assert torch.equal(order[:num_valid].long(), expected)
    assert torch.equal(counts, torch.bincount(groups[groups >= 0], minlength=5))
    assert starts.tolist() == [0, *counts.cumsum(0).tolist()]
