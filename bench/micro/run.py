"""Microbenchmarks of the ops: interlace bench --all, or the names of ops.

Every backend that serves is timed beside what a user would run instead, in turns, in one run. An
op whose contract test is red on the device is not timed. What could not run is listed with its
reason, on the terminal and in the JSON lines, which lie in bench/results/<device> of a checkout, or
else in interlace-bench/<device>, unless --output says otherwise. How to add an op: see the package.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from interlace import ops
from interlace.microbenchmarks import results
from interlace.microbenchmarks.case import Setup
from interlace.microbenchmarks.ceilings import Ceilings, measure_ceilings
from interlace.microbenchmarks.gate import contract_violations, first_line
from interlace.microbenchmarks.measure import Bench, measure
from interlace.microbenchmarks.order import measured_order, update_order
from interlace.microbenchmarks.registry import cases_of, timed_ops
from interlace.microbenchmarks.shapes import DEFAULT, SHAPES
from interlace.microbenchmarks.table import show_case, show_run
from interlace.microbenchmarks.timing import FULL, QUICK, clock_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from interlace.microbenchmarks.measure import Record
    from interlace.ops._registry import Op

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ORDER_FILE = Path(ops.__file__).with_name("order.json")


@dataclass(eq=False)
class Run:
    """One call of this script.

    Attributes:
        arguments: of the command line.
        console: where tables go.
        folder: where results go.
        failed: what went wrong, in words.
    """

    arguments: argparse.Namespace
    console: Console
    folder: Path
    failed: list[str] = field(default_factory=list)
    _ceilings: dict[torch.dtype, Ceilings] = field(default_factory=dict)

    def time_all(self, chosen: Sequence[Op]) -> None:
        """Time ops one after the other, each with an even share of the time that is left."""
        end = time.monotonic() + (self.arguments.budget or float("inf"))
        for number, op in enumerate(chosen):
            share = (end - time.monotonic()) / (len(chosen) - number)
            try:
                self.time_op(op, time.monotonic() + share)
            # the ops behind it are still worth timing
            except Exception as error:  # noqa: BLE001
                self.fail(op.name, f"raised {first_line(error)}")

    def time_apart(self, chosen: Sequence[Op], argv: Sequence[str]) -> None:
        """Time each op in a process of its own: a kernel that faults takes its process with it."""
        end = time.monotonic() + (self.arguments.budget or float("inf"))
        # positional arguments go first, since options may take several values
        options = [each for each in argv if each != "--all" and each not in timed_ops()]
        for number, op in enumerate(chosen):
            limited, limit = options, None
            if self.arguments.budget:
                share = max(0.1, (end - time.monotonic()) / (len(chosen) - number))
                # of two budgets the last counts
                limited, limit = [*options, "--budget", f"{share:.1f}"], share + 60
            try:
                done = subprocess.run(
                    [sys.executable, "-P", "-m", "interlace", "bench", op.name, *limited],
                    check=False,
                    timeout=limit,
                )
            except subprocess.TimeoutExpired:
                self.fail(op.name, f"was stopped after {limit:.0f} s; what it had stays written")
                continue
            if done.returncode:
                self.fail(op.name, f"ended with exit status {done.returncode}")

    def time_op(self, op: Op, deadline: float) -> None:
        """Gate, time and write one op; `deadline` is in time.monotonic's seconds."""
        cases = cases_of(op.name)
        if isinstance(cases, str):
            self.fail(op.name, cases)
            return
        arguments, device = self.arguments, torch.device(self.arguments.device)
        path = self.folder / results.file_name(op.name, quick=arguments.quick)
        red = contract_violations(op, device, [DTYPES[name] for name in arguments.dtype])
        if red:
            results.write_lines(path, [results.refusal_record(op.name, red)])
            self.fail(op.name, f"is not timed, its contract test is red: {'; '.join(red)}")
            return
        records: list[Record] = []
        for name in arguments.dtype:
            bench = self._bench(DTYPES[name])
            records.append(results.run_record(op.name, bench, _plain(arguments)))
            show_run(records[-1], self.console)
            for record in self._records(op, cases, bench, deadline):
                records.append(record)
                if record["kind"] == "case":
                    show_case(record, self.console)
                else:
                    self.console.print(f"left out: {record['what']}: {record['reason']}")
                # an interrupted run keeps what it has
                results.write_lines(path, records)
        self.console.print(f"written to {path}", highlight=False, soft_wrap=True)
        timed = [record for record in records if record["kind"] == "case"]
        if arguments.plots and timed:
            from interlace.microbenchmarks.plots import plot_cases

            plot_cases(timed, path.with_suffix(".png"))
        if arguments.update_order and timed:
            update_order(ORDER_FILE, results.device_name(device), measured_order(op, timed))

    def _records(self, op: Op, cases: Any, bench: Bench, deadline: float) -> Iterator[Record]:
        setup = bench.setup
        for shape_name in self.arguments.shapes:
            fresh = Setup.seeded(setup.device, setup.dtype, quick=setup.quick)
            try:
                for case in cases(SHAPES[shape_name], fresh):
                    if time.monotonic() < deadline:
                        yield from measure(op, shape_name, case, bench)
                    else:
                        yield results.left_out_record(
                            op.name, f"{shape_name}/{case.name}", "the time of --budget was spent"
                        )
            # the cases of other shapes and ops are still worth timing
            except Exception as error:  # noqa: BLE001
                self.fail(op.name, f"cases of {shape_name} raised {first_line(error)}")
                yield results.left_out_record(
                    op.name, f"{shape_name}, what is left of it", f"raised {first_line(error)}"
                )

    def _bench(self, dtype: torch.dtype) -> Bench:
        device, quick = torch.device(self.arguments.device), self.arguments.quick
        effort, clock = (QUICK if quick else FULL)[device.type], clock_for(device)
        if dtype not in self._ceilings:
            self._ceilings[dtype] = measure_ceilings(device, dtype, clock, effort)
        setup = Setup.seeded(device, dtype, quick=quick)
        return Bench(setup, clock, effort, self._ceilings[dtype])

    def fail(self, op_name: str, reason: str) -> None:
        """Say what went wrong, now and at the end."""
        self.failed.append(f"{op_name} {reason}")
        self.console.print(f"{op_name} {reason}", markup=False, highlight=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("interlace bench", description="Time ops, every backend.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(timed_ops())}")
    parser.add_argument("--all", action="store_true", help="every op of the registry")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--shapes", nargs="+", choices=(*SHAPES, "all"), metavar="SHAPE")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16 on cuda, or fp32")
    parser.add_argument("--quick", action="store_true", help="few, small cases and short turns")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--plots", action="store_true", help="write a PNG per op beside the JSON")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after these")
    parser.add_argument("--commit", help="what is timed, where there is no git to ask")
    parser.add_argument("--threads", type=int, help="processor threads; default: torch's choice")
    parser.add_argument(
        "--update-order",
        action="store_true",
        help=f"write {ORDER_FILE.name}, read by interlace.ops",
    )
    arguments = parser.parse_args(argv)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    unknown = sorted(set(arguments.ops) - set(timed_ops()))
    if unknown:
        parser.error(f"no op {', '.join(unknown)}; choose of {', '.join(timed_ops())}")
    if arguments.all == bool(arguments.ops):
        parser.error("name ops, or give --all")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --device cpu")
    if arguments.update_order and arguments.device == "cpu":
        parser.error("the order of backends is kept per GPU; --update-order needs --device cuda")
    is_cuda = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ["bfloat16" if is_cuda else "float32"]
    arguments.shapes = arguments.shapes or DEFAULT
    if "all" in arguments.shapes:
        arguments.shapes = tuple(SHAPES)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Time the ops; 0 if all went well."""
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = arguments.output or results.results_folder(torch.device(arguments.device))
    # a pipe has no width, and a table cut to 80 columns says little
    console = Console(width=None if sys.stdout.isatty() else 130)
    run = Run(arguments, console, folder)
    chosen = [op for name, op in timed_ops().items() if arguments.all or name in arguments.ops]
    if arguments.device == "cuda" and len(chosen) > 1:
        run.time_apart(chosen, sys.argv[1:] if argv is None else argv)
    else:
        run.time_all(chosen)
    for reason in run.failed:
        print(f"failed: {reason}")
    return 1 if run.failed else 0


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    # where files go says something of a machine and nothing of the measurement
    left = {name: value for name, value in vars(arguments).items() if name != "output"}
    return {name: list(each) if isinstance(each, tuple) else each for name, each in left.items()}
