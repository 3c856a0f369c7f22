"""The C++ kernel of ragged_attention where its blocks, tiles and threads could show."""

from __future__ import annotations

import importlib
from itertools import accumulate
from typing import Any

import pytest
import torch

from interlace import ops
from interlace.ops import _ragged_attention_compiled as compiled
from interlace.ops._check import bits, in_fp64

# the module, whose name the function hides
contract = importlib.import_module("interlace.ops.ragged_attention")

# a block holds 64 keys, a task 128 rows, a tile of rows 32, 16 or 8 of them
HELD_BACK: dict[str, dict[str, Any]] = {
    "one_row_and_a_block": {"lengths": [(1, 64)], "groups": (1,)},
    "one_row_more_than_a_task": {"lengths": [(43, 43)], "groups": (3,)},
    "around_a_block": {"lengths": [(63, 63), (64, 64), (65, 65)], "groups": (1, 2)},
    "around_a_task": {"lengths": [(127, 127), (128, 128), (129, 129)], "groups": (1,)},
    "many_heads_per_key": {"lengths": [(9, 70)], "groups": (0, 37, 1)},
    "full": {"lengths": [(70, 70), (5, 5)], "groups": (1, 3), "causal": False},
    "cross_longer": {"lengths": [(140, 9)], "groups": (2, 1), "causal": False},
    "cross_shorter": {"lengths": [(3, 333), (0, 7), (1, 1)], "groups": (5,), "causal": False},
    "blind_rows_of_two_tasks": {"lengths": [(300, 20)], "groups": (1,)},
    "window_within_a_block": {"lengths": [(200, 200)], "groups": (1, 2), "window": 5},
    "window_of_a_block": {"lengths": [(200, 200)], "groups": (3,), "window": 64},
    "window_over_blocks": {"lengths": [(150, 290)], "groups": (2,), "window": 130},
    "two_sided": {"lengths": [(180, 140)], "groups": (1, 1), "window": 33, "causal": False},
    "window_of_one": {"lengths": [(90, 90)], "groups": (4,), "window": 1},
    "gated": {"lengths": [(66, 80), (2, 0)], "groups": (2, 0, 1), "gate": True},
    "no_key_at_all": {"lengths": [(5, 0), (2, 0)], "groups": (1, 2)},
    "large_scores": {"lengths": [(150, 150)], "groups": (2,), "scale": 40.0},
}


def prefix(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def draw(
    lengths: list[tuple[int, int]],
    groups: tuple[int, ...],
    *,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    gate: bool = False,
) -> tuple[Any, ...]:
    """Arguments of the op's implementations."""
    queries, keys = ([pair[i] for pair in lengths] for i in range(2))
    q = torch.randn(sum(queries), sum(groups), head_dim).to(dtype)
    k, v = (torch.randn(sum(keys), len(groups), head_dim).to(dtype) for _ in range(2))
    return (
        *(q, k, v, torch.randn(sum(groups)) if gate else None, prefix(queries), prefix(keys)),
        *(list(ops.q_start_of(groups)), max(queries), max(keys)),
        *(causal, window, head_dim**-0.5 if scale is None else scale),
    )


def excesses(args: tuple[Any, ...], **options: int) -> list[str]:
    """How the kernel breaks the error budget."""
    found, plain = compiled.forward(*args, **options), contract.reference(*args)
    truth = contract.reference(*in_fp64(args))
    checked = zip(found, plain, truth, strict=True)
    return [words for each in checked if (words := contract.OP.budget.excess(*each))]


def assert_same_bits(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> None:
    for first, second in zip(one, other, strict=True):
        assert torch.equal(bits(first.contiguous()), bits(second.contiguous()))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("max_lanes", [4, 8, 16])
@pytest.mark.parametrize("name", HELD_BACK)
def test_shapes_around_its_blocks_keep_the_budget(name: str, max_lanes: int) -> None:
    assert excesses(draw(**HELD_BACK[name]), max_lanes=max_lanes) == []


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", contract.OP.dtypes)
@pytest.mark.parametrize("max_lanes", [4, 8, 16])
def test_head_sizes_keep_the_budget(max_lanes: int, dtype: torch.dtype) -> None:
    for head_dim in (1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 72, 80, 96, 100, 128, 255, 256):
        args = draw([(11, 11), (3, 69)], (2, 1), head_dim=head_dim, dtype=dtype)
        assert excesses(args, max_lanes=max_lanes) == [], head_dim


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", contract.OP.dtypes)
@pytest.mark.parametrize("max_lanes", [4, 8])
def test_variants_for_other_processors_keep_the_budget(max_lanes: int, dtype: torch.dtype) -> None:
    for sample in contract.OP.samples(torch.device("cpu"), dtype):
        assert excesses(sample.args, max_lanes=max_lanes) == [], sample.name


@pytest.mark.parametrize("dtype", contract.OP.dtypes)
def test_a_long_prompt_at_the_size_of_a_real_model_keeps_the_budget(dtype: torch.dtype) -> None:
    assert excesses(draw([(700, 700)], (4, 1), head_dim=128, dtype=dtype)) == []


@pytest.mark.parametrize("causal", [False, True])
def test_number_of_threads_changes_no_bit(causal: bool) -> None:
    args = draw([(170, 170), (0, 3), (40, 90)], (4, 1, 2), head_dim=64, causal=causal)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(compiled.forward(*args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_other_sequences_change_no_bit() -> None:
    lengths = [(70, 70), (3, 0), (21, 140)]
    q, k, v, gate, bounds_q, bounds_kv, *others = draw(lengths, (2, 3), gate=True)
    out, lse = compiled.forward(q, k, v, gate, bounds_q, bounds_kv, *others)
    for i, (num_queries, num_keys) in enumerate(lengths):
        rows, keys = (slice(*bounds[i : i + 2].tolist()) for bounds in (bounds_q, bounds_kv))
        alone = (prefix([num_queries]), prefix([num_keys]))
        found = compiled.forward(q[rows], k[keys], v[keys], gate, *alone, *others)
        assert_same_bits(found, (out[rows], lse[:, rows]))


def test_place_in_memory_changes_no_bit() -> None:
    q, k, v, gate, *others = draw([(40, 75)], (2, 3), head_dim=24, gate=True)
    expected = compiled.forward(q, k, v, gate, *others)
    assert gate is not None
    spread = gate.repeat_interleave(2)[::2]
    bounds = [each.repeat_interleave(3)[::3] for each in others[:2]]
    for places in (
        # one element beside the other no more; then heads outside of tokens, and odd addresses
        [each.transpose(0, 2).contiguous().transpose(0, 2) for each in (q, k, v)],
        [each.transpose(0, 1).contiguous().transpose(0, 1) for each in (q, k, v)],
        [torch.nn.functional.pad(each, (1, 2))[..., 1:-2] for each in (q, k, v)],
    ):
        assert_same_bits(compiled.forward(*places, spread, *bounds, *others[2:]), expected)


def test_nan_reaches_only_the_rows_of_its_query() -> None:
    q, *others = draw([(50, 50)], (2, 1), causal=False)
    plain_out, plain_lse = compiled.forward(q, *others)
    broken = q.clone()
    broken[7, 1, 3] = float("nan")
    out, lse = compiled.forward(broken, *others)
    hit = torch.zeros(50, 3, dtype=torch.bool)
    hit[7, 1] = True
    assert bool(out[hit].isnan().all())
    assert bool(lse.T[hit].isnan().all())
    assert torch.equal(out[~hit], plain_out[~hit])
    assert torch.equal(lse.T[~hit], plain_lse.T[~hit])


def test_refuses_double_precision_in_words() -> None:
    args = draw([(4, 4)], (1,), dtype=torch.float64)
    reasons = dict(contract.OP.explain(*args))
    assert reasons["cpp"] == "works on fp32, bf16 and fp16, got torch.float64"
