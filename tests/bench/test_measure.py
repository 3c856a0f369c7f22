"""What the microbenchmarks measure, write and refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from interlace.microbenchmarks import results
from interlace.microbenchmarks.case import Case
from interlace.microbenchmarks.gate import contract_violations
from interlace.microbenchmarks.measure import measure
from interlace.microbenchmarks.timing import Contender, CpuClock, Effort, clock_for, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from interlace.microbenchmarks.measure import Bench
    from interlace.ops._registry import Op

CPU = torch.device("cpu")
DTYPES = (torch.float32,)


def test_gate_opens_for_a_good_op_and_says_what_is_red(make_op: Callable[..., Op]) -> None:
    assert contract_violations(make_op(), CPU, DTYPES) == []
    (said,) = contract_violations(make_op(kernel=lambda x, factor: x * factor + 1e-3), CPU, DTYPES)
    assert "float32, sample seven: cpp: output 0: largest error 1.000e-03 exceeds" in said


def test_gate_looks_at_the_backward_too(make_op: Callable[..., Op]) -> None:
    op = make_op(backward_kernel=lambda gradient, x, factor: gradient)
    assert [said.split(",")[0] for said in contract_violations(op, CPU, DTYPES)] == [
        f"{op.name}_bwd"
    ]


def test_gate_is_red_where_a_backend_raises(make_op: Callable[..., Op]) -> None:
    def broken(x: torch.Tensor, factor: float) -> torch.Tensor:
        raise OverflowError("too large\nfor this kernel")

    (said,) = contract_violations(make_op(kernel=broken), CPU, DTYPES)
    assert said.endswith("raised OverflowError: too large")


def toy_case(bench: Bench) -> Case:
    x = bench.setup.randn(64)

    def failing() -> torch.Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    return Case(
        "t64",
        args=(x, 2.0),
        baselines={
            "added": lambda: x + x,
            "off by one": lambda: x * 2 + 1,
            "cut off from x": lambda: x.detach() * 2,
            "failing": failing,
            "missing": "otherlib is not installed",
        },
        backward=True,
    )


def test_figures_follow_from_the_medians(make_op: Callable[..., Op], bench: Bench) -> None:
    forward, backward = measure(make_op(), "tiny", toy_case(bench), bench)
    assert (forward["direction"], backward["direction"]) == ("forward", "backward")
    for record in (forward, backward):
        assert record["case"] == "tiny/t64"
        assert (record["bytes"], record["flops"]) == (512, 64)
        medians = {row["name"]: row["median_ms"] for row in record["rows"]}
        assert list(medians.values()) == sorted(medians.values())
        best = min(name for name in medians if name != "cpp" and name == record["best_baseline"])
        assert medians[best] == min(ms for name, ms in medians.items() if name != "cpp")
        for row in record["rows"]:
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["ratio_to_best_baseline"] == pytest.approx(medians[best] / row["median_ms"])
            assert row["gb_per_s"] == pytest.approx(512e-6 / row["median_ms"])
            assert row["percent_of_copy"] == pytest.approx(10 * row["gb_per_s"])
            assert row["percent_of_matmul"] == pytest.approx(200 * row["tflop_per_s"])
            assert row["is_backend"] == (row["name"] in ("cpp", "torch"))


def test_nothing_is_left_out_without_a_reason(make_op: Callable[..., Op], bench: Bench) -> None:
    op, case = make_op(), toy_case(bench)
    forward, backward = measure(op, "tiny", case, bench)
    refused = {"cuda": f"{op.name} has no cuda kernel", "triton": f"{op.name} has no triton kernel"}
    missing = {
        "failing": "raised RuntimeError: no such kernel",
        "missing": "otherlib is not installed",
    }
    assert forward["left_out"] == {**refused, **missing}
    assert backward["left_out"] == {
        **refused,
        **missing,
        "cut off from x": "raised ValueError: its outputs do not depend on the op's own tensors",
    }
    for record in (forward, backward):
        timed = {row["name"] for row in record["rows"]}
        assert timed | set(record["left_out"]) == {"cpp", "torch", *refused, *case.baselines}


def test_a_backend_left_out_by_the_case_is_listed(make_op: Callable[..., Op], bench: Bench) -> None:
    case = Case("t8", args=(bench.setup.randn(8), 2.0), left_out={"torch": "needs 30 GB"})
    (record,) = measure(make_op(), "tiny", case, bench)
    assert record["left_out"]["torch"] == "needs 30 GB"
    assert [row["name"] for row in record["rows"]] == ["cpp"]
    assert record["best_baseline"] is None


def test_baselines_are_compared_with_the_reference(
    make_op: Callable[..., Op], bench: Bench
) -> None:
    case = toy_case(bench)
    forward, _ = measure(make_op(), "tiny", case, bench)
    apart = {row["name"]: row["largest_difference"] for row in forward["rows"]}
    assert apart["cpp"] == apart["added"] == apart["torch"] == 0
    largest = float(2 * case.args[0].abs().max())
    assert apart["off by one"] == pytest.approx(1 / largest, rel=1e-5)


def test_turns_alternate_and_patience_ends() -> None:
    log: list[str] = []
    contenders = [Contender(name, True, lambda name=name: log.append(name)) for name in "abc"]

    class OneCall:
        def turn(self, call: Callable[[], None], seconds: float) -> list[tuple[float, float]]:
            call()
            return [(2.0, 1.0)]

    take_turns(contenders, OneCall(), Effort(rounds=3))
    assert "".join(log) == "abccbaabc"
    assert [each.seconds for each in contenders] == [[2.0] * 3] * 3
    assert contenders[0].host_seconds == [1.0] * 3
    log.clear()
    take_turns(contenders, OneCall(), Effort(rounds=3, patience_seconds=-1.0))
    assert log == []


def test_cpu_clock_times_short_calls_in_blocks_and_long_ones_singly() -> None:
    calls = [0]

    def count() -> None:
        calls[0] += 1

    entries = CpuClock().turn(count, 5e-3)
    assert calls[0] > 10 * len(entries)
    assert all(0 < seconds < 1e-3 and seconds == host for seconds, host in entries)
    calls[0] = 0

    def long() -> None:
        calls[0] += 1
        torch.randn(200_000)

    assert len(CpuClock().turn(long, 0.0)) == calls[0] == 1


@pytest.mark.gpu
def test_gpu_clock_overwrites_the_cache_before_every_call() -> None:
    clock = clock_for(torch.device("cuda"))
    said = clock.describe()
    assert said["flush_bytes"] == 2 * said["l2_bytes"] > 0
    calls = [0]

    def count() -> None:
        calls[0] += 1

    entries = clock.turn(count, 1e-3)
    # the first call says how many more there is time for
    assert len(entries) == calls[0] - 1 > 0
    assert all(seconds >= 0 and host > 0 for seconds, host in entries)


def test_lines_come_back_as_written(
    make_op: Callable[..., Op], bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "micro-toy.jsonl"
    records = [
        results.run_record("toy", bench, {"quick": True}),
        *measure(make_op(), "tiny", toy_case(bench), bench),
    ]
    results.write_lines(path, records)
    run, forward, _ = results.read_lines(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert run["versions"]["torch"] == torch.__version__
    assert run["ceilings"]["copy_gb_per_s"] == 10.0
    assert {"date", "commit", "threads", "load_average", "processor", "device"} <= run.keys()
    for written, kept in zip(forward["rows"], records[1]["rows"], strict=True):
        assert written["median_ms"] == pytest.approx(kept["median_ms"], rel=1e-5)
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write_lines(path, [{"median_ms": float("nan")}])
    assert len(results.read_lines(path)) == 3
