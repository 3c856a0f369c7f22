"""The command line of the microbenchmarks, its cases files, and the order that it writes."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from interlace.microbenchmarks import results, run
from interlace.microbenchmarks.case import Case, Setup
from interlace.microbenchmarks.measure import measure
from interlace.microbenchmarks.order import measured_order, update_order
from interlace.microbenchmarks.registry import cases_of, timed_ops
from interlace.microbenchmarks.shapes import SHAPES
from interlace.microbenchmarks.timing import Effort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from interlace.microbenchmarks.measure import Bench
    from interlace.microbenchmarks.shapes import ModelShape
    from interlace.ops._registry import Op


def toy_cases(shape: ModelShape, setup: Setup) -> Iterator[Case]:
    for size in (8, 16):
        x = setup.randn(size)
        yield Case(f"t{size}", args=(x, 2.0), baselines={"added": lambda x=x: x + x})


@pytest.fixture
def time_toy(
    make_op: Callable[..., Op], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """Run the script on a toy op, and return its exit status and the lines it wrote."""

    def time(*options: str, kernel: Any = None, cases: Any = toy_cases) -> tuple[int, Any]:
        op = make_op(kernel=kernel) if kernel else make_op()
        monkeypatch.setattr(run, "cases_of", lambda name: cases)
        monkeypatch.setattr(run, "QUICK", {"cpu": Effort(rounds=2, turn_seconds=1e-3)})
        arguments = [op.name, "--device", "cpu", "--shapes", "tiny", "--quick", *options]
        status = run.main([*arguments, "--output", str(tmp_path)])
        path = tmp_path / results.file_name(op.name, quick=True)
        return status, results.read_lines(path)

    return time


def test_run_writes_a_header_and_a_line_per_case(time_toy: Any, tmp_path: Path) -> None:
    status, (header, *cases) = time_toy("--plots")
    assert status == 0
    assert header["kind"] == "run"
    assert header["arguments"]["shapes"] == ["tiny"]
    assert [case["case"] for case in cases] == ["tiny/t8", "tiny/t16"]
    assert str(tmp_path) not in json.dumps([header, *cases])
    (plot,) = tmp_path.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_red_op_is_not_timed(time_toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x

    status, lines = time_toy(kernel=wrong)
    assert status == 1
    assert [line["kind"] for line in lines] == ["refused"]
    assert "largest error" in lines[0]["violations"][0]
    assert "its contract test is red" in capsys.readouterr().out


def test_cases_beyond_the_budget_are_listed(time_toy: Any) -> None:
    status, (_, *lines) = time_toy("--budget", "1e-9")
    assert status == 0
    assert [(line["kind"], line["what"]) for line in lines] == [
        ("left_out", "tiny/t8"),
        ("left_out", "tiny/t16"),
    ]


def test_cases_that_cannot_be_made_fail_the_run_and_keep_the_rest(time_toy: Any) -> None:
    def broken(shape: ModelShape, setup: Setup) -> Iterator[Case]:
        yield from toy_cases(shape, setup)
        raise MemoryError("too large")

    status, (_, *lines) = time_toy(cases=broken)
    assert status == 1
    assert [line["kind"] for line in lines] == ["case", "case", "left_out"]
    assert lines[-1]["reason"] == "raised MemoryError: too large"


def test_ops_in_processes_of_their_own_do_not_take_each_other_along(
    make_op: Callable[..., Op], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ops = [make_op() for _ in range(3)]
    called: list[list[str]] = []

    def fake(command: list[str], timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        called.append(command)
        if len(called) == 2:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, -11 if len(called) == 1 else 0)

    monkeypatch.setattr(run.subprocess, "run", fake)
    argv = ["--all", "--device", "cpu", "--shapes", "tiny", "clip-l", "--budget", "30"]
    made = run.Run(run.parse(argv), Console(), tmp_path)
    made.time_apart(ops, argv)
    for op, command in zip(ops, called, strict=True):
        child = run.parse(command[command.index("bench") + 1 :])
        assert (child.ops, child.all, child.shapes) == ([op.name], False, ["tiny", "clip-l"])
        assert 0 < child.budget <= 30
    assert [each.split(" ", 1)[1][:30] for each in made.failed] == [
        "ended with exit status -11",
        "was stopped after 75 s; what i",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "name ops, or give --all"),
        (["--device", "cpu", "no_op"], "no op no_op; choose of"),
        (["--device", "cpu", "--all", "--update-order"], "kept per GPU"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", timed_ops())
def test_every_op_has_cases_whose_baselines_compute_the_same(name: str, bench: Bench) -> None:
    cases = cases_of(name)
    assert not isinstance(cases, str), f"{name} {cases}"
    found = list(cases(SHAPES["tiny"], bench.setup))
    assert len({case.name for case in found}) == len(found) > 0
    for case in found:
        # compiling takes seconds each, and computes what the eager one does
        eager = {k: v for k, v in case.baselines.items() if "compile" not in k}
        plain = Case(case.name, case.args, eager, case.backward, case.left_out)
        for record in measure(timed_ops()[name], "tiny", plain, bench):
            raised = {k: v for k, v in record["left_out"].items() if v.startswith("raised")}
            assert raised == {}
            for row in record["rows"]:
                assert row["largest_difference"] is not None, row["name"]
                assert row["largest_difference"] < 1e-4, row["name"]


def test_shapes_fit_together() -> None:
    for shape in SHAPES.values():
        for tower in (shape.text, shape.vision):
            assert tower.query_heads % tower.kv_heads == 0
            assert tower.norm in ("rms", "layer")
            assert not tower.mrope_section or 2 * sum(tower.mrope_section) == tower.head_dim
        assert shape.vision.query_heads * shape.vision.head_dim == shape.vision.hidden


def record(direction: str, **medians: float) -> dict[str, Any]:
    rows = [
        {"name": name, "median_ms": ms, "is_backend": name != "SDPA"}
        for name, ms in medians.items()
    ]
    return {"direction": direction, "rows": rows}


def test_order_goes_by_the_geometric_mean_over_shared_cases(make_op: Callable[..., Op]) -> None:
    op = make_op()
    records = [
        record("forward", cuda=1.0, triton=4.0, torch=0.1, SDPA=0.1),
        record("forward", cuda=3.0, triton=0.5, torch=0.1),
        # one kernel alone proves nothing
        record("forward", cuda=0.001),
        record("backward", triton=2.0, torch=3.0),
    ]
    # 1 * 3 > 4 * 0.5, though the sum says the opposite
    assert measured_order(op, records) == {
        op.name: ["triton", "cuda"],
        f"{op.name}_bwd": ["triton"],
    }
    apart = [record("forward", cuda=1.0), record("forward", triton=1.0)]
    assert measured_order(op, apart) == {}


def test_order_file_keeps_what_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    update_order(path, "GPU A", {"one": ["cuda", "triton"], "two": ["triton"]})
    update_order(path, "GPU B", {"one": ["triton", "cuda"]})
    update_order(path, "GPU A", {"two": ["cuda", "triton"]})
    assert json.loads(path.read_text()) == {
        "GPU A": {"one": ["cuda", "triton"], "two": ["cuda", "triton"]},
        "GPU B": {"one": ["triton", "cuda"]},
    }
    assert [each.name for each in tmp_path.iterdir()] == ["order.json"]
