"""Whole models, fused and not: python bench/e2e.py --preset small (CPU) or full (GPU).

Models have random weights in the sizes of real ones and get one image and a prompt. Timed are the
time to the first token (TTFT: `generate` for one token) and the tokens per second that follow, with
transformers' own attention ("eager", "sdpa"), with its static cache and torch.compile, and fused by
this package; each dense and without 25 % of the text layers. CLIP generates nothing; there the time
is that of a forward pass. Contenders take turns where they run on the CPU, so that what else the
machine does meets all of them.

Percentages relate to what the device did in the same run: for decoding, bytes of the weights that a
token passes, to a copy's bytes per second; for the prompt, multiplications with weights, to those
of a square matrix product.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from e2e_gate import MOST, STEPS, logits_error
from e2e_models import (
    SIZES,
    build,
    inputs_of,
    parameters_at_work,
    text_parameters,
    without_a_quarter,
)
from rich.console import Console
from rich.table import Table

import interlace as il
from interlace.microbenchmarks import results
from interlace.microbenchmarks.case import Setup
from interlace.microbenchmarks.ceilings import measure_ceilings
from interlace.microbenchmarks.gate import first_line
from interlace.microbenchmarks.measure import Bench
from interlace.microbenchmarks.timing import FULL, clock_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from e2e_models import Inputs, Size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what a contender does: attention of transformers, static cache, and options of fuse or None
WAYS: dict[str, tuple[str, bool, dict[str, Any] | None]] = {
    "sdpa": ("sdpa", False, None),
    "fused": ("sdpa", False, {}),
    "fused static": ("sdpa", True, {}),
    "fused static overlap": ("sdpa", True, {"overlap": True}),
    "sdpa static compile": ("sdpa", True, None),
    "eager": ("eager", False, None),
}
BASELINE = ("dense", "sdpa")


@dataclass(frozen=True)
class Preset:
    """What is timed.

    Attributes:
        device: where.
        models: names in `e2e_models.SIZES`.
        batches: rows.
        tokens: generated after the first.
        rounds: how often every contender has its turn.
        repeats: calls in a turn, after one that is not timed.
        ways: names in `WAYS`.
    """

    device: str
    models: tuple[str, ...]
    batches: tuple[int, ...]
    tokens: int
    rounds: int
    repeats: int
    ways: tuple[str, ...]


PRESETS = {
    "small": Preset("cpu", ("small",), (1,), 12, 3, 1, ("sdpa", "fused", "eager")),
    "full": Preset(
        "cuda",
        ("qwen3-vl-8b", "qwen3-vl-4b", "llava-1.5-7b", "clip-l"),
        (1, 16),
        32,
        1,
        3,
        (
            "sdpa",
            "fused static",
            "fused static overlap",
            "sdpa static compile",
            "fused",
            "eager",
        ),
    ),
}


@dataclass(eq=False)
class Contender:
    """A model in one way of running it.

    Attributes:
        pruned: "dense" or "25 % dropped".
        way: name in `WAYS`.
        model: the model; contenders share it.
        first: seconds to the first token, one entry per call: of the clock, and of processors.
        rest: seconds for the tokens after it, likewise.
        peak_bytes: most memory that was given out at a time; None on the CPU.
        logits: of the first tokens, [B, V] each.
        error: of the logits, against those of transformers with SDPA.
    """

    pruned: str
    way: str
    model: Any
    first: list[tuple[float, float]] = field(default_factory=list)
    rest: list[tuple[float, float]] = field(default_factory=list)
    peak_bytes: int | None = None
    logits: list[torch.Tensor] = field(default_factory=list)
    error: float = 0.0

    @contextlib.contextmanager
    def readied(self) -> Iterator[None]:
        """Put the model into this way, and back."""
        attention, _, fused = WAYS[self.way]
        self.model.set_attn_implementation(attention)
        if fused is None:
            yield
            return
        il.fuse(self.model, **fused)
        try:
            yield
        finally:
            il.unfuse(self.model)

    def call(self, inputs: Inputs, tokens: int, *, keep: bool = False) -> None:
        """Generate, or run the forward of a model that cannot; the logits are kept if asked for."""
        if not self.model.can_generate():
            self.logits = [self.model(**inputs).logits_per_image]
            return
        _, static, _ = WAYS[self.way]
        made = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static" if static else None,
            # on a GPU transformers compiles by itself where the cache is static
            disable_compile=self.way != "sdpa static compile" or None,
            return_dict_in_generate=keep,
            output_logits=keep,
        )
        if keep:
            self.logits = list(made.logits[:STEPS])

    def turn(self, inputs: Inputs, preset: Preset) -> None:
        """Time some calls."""
        device = inputs["input_ids"].device
        counts = (1, 1 + preset.tokens) if self.model.can_generate() else (1,)
        # what comes in the same shape again is recorded the second time
        for count in counts * (2 if device.type == "cuda" else 1):
            self.call(inputs, count, keep=count > 1)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(preset.repeats):
            taken = [_seconds(self, inputs, count, device) for count in counts]
            self.first.append(taken[0])
            if len(taken) > 1:
                pairs = zip(taken[1], taken[0], strict=True)
                wall, processor = (max(whole - part, 1e-9) for whole, part in pairs)
                self.rest.append((wall, processor))
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(device)


def _seconds(
    contender: Contender, inputs: Inputs, tokens: int, device: torch.device
) -> tuple[float, float]:
    """Time a call by the clock, and by what the processors worked for this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter(), time.process_time()
    contender.call(inputs, tokens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def time_model(
    size: Size, batch: int, models: dict[str, Any], preset: Preset, bench: Bench, end: float
) -> dict[str, Any]:
    """Let all contenders take turns on one model and batch; return their figures."""
    device, dtype = bench.setup.device, bench.setup.dtype
    inputs = inputs_of(size, batch, device, dtype)
    contenders = [
        Contender(pruned, way, model)
        for way in preset.ways
        for pruned, model in models.items()
        if model.can_generate() or not WAYS[way][1]
    ]
    left_out: dict[str, str] = {}
    for _ in range(preset.rounds):
        for each in contenders:
            name = f"{each.pruned}, {each.way}"
            if name in left_out:
                continue
            if time.monotonic() > end and (each.pruned, each.way) != BASELINE:
                if not each.first:
                    left_out[name] = "the time of --budget was spent"
                continue
            try:
                with torch.no_grad(), each.readied():
                    each.turn(inputs, preset)
                each.error = logits_error(each.logits, _stock(each, contenders).logits)
                if each.error > MOST:
                    raise ValueError(f"logits are {each.error:.3g} off")
            # the other contenders are still worth timing
            except Exception as error:  # noqa: BLE001
                left_out[name] = f"raised {first_line(error)}"
                each.first.clear()
    timed = [each for each in contenders if each.first]
    rows = [_figures(each, inputs, batch, preset, bench) for each in timed]
    # on a GPU the processors only wait
    clock = "processor" if device.type == "cpu" else "wall"
    base = next((row for row in rows if (row["pruned"], row["way"]) == BASELINE), None)
    for row in rows if base else ():
        for part in ("ttft", "decode"):
            key = f"{part}_{clock}_ms"
            if row[key] is not None:
                row[f"{part}_ratio_to_dense_sdpa"] = base[key] / row[key]
    return {"prompt_tokens": inputs["input_ids"].shape[1], "rows": rows, "left_out": left_out}


def _stock(each: Contender, contenders: list[Contender]) -> Contender:
    """The same model run by transformers with SDPA, if it had its turn; else the contender."""
    ways = (one for one in contenders if (one.pruned, one.way) == (each.pruned, "sdpa"))
    return next((one for one in ways if one.logits), each)


def _figures(
    each: Contender, inputs: Inputs, batch: int, preset: Preset, bench: Bench
) -> dict[str, Any]:
    first, rest = _medians(each.first), _medians(each.rest)
    flops = 2 * parameters_at_work(each.model, inputs)
    rates = bench.ceilings
    row: dict[str, Any] = {
        "pruned": each.pruned,
        "way": each.way,
        "entries": len(each.first),
        "ttft_wall_ms": 1e3 * first[0],
        "ttft_processor_ms": 1e3 * first[1],
        "percent_of_matmul": 100 * flops / first[0] / 1e12 / rates.matmul_tflop_per_s,
        "decode_wall_ms": None,
        "decode_processor_ms": None,
        "decode_tokens_per_s": None,
        "percent_of_copy": None,
        "logits_error": each.error,
        "peak_gb": None if each.peak_bytes is None else each.peak_bytes / 1e9,
    }
    if each.rest:
        per_step = rest[0] / preset.tokens
        size = text_parameters(each.model) * bench.setup.dtype.itemsize
        row["decode_wall_ms"] = 1e3 * per_step
        row["decode_processor_ms"] = 1e3 * rest[1] / preset.tokens
        row["decode_tokens_per_s"] = batch / per_step
        row["percent_of_copy"] = 100 * size / per_step / 1e9 / rates.copy_gb_per_s
    return row


def _medians(entries: list[tuple[float, float]]) -> tuple[float, float]:
    if not entries:
        return 0.0, 0.0
    wall, processor = (statistics.median(each) for each in zip(*entries, strict=True))
    return wall, processor


def show(name: str, batch: int, found: dict[str, Any], console: Console) -> None:
    """Print the figures of one model and batch."""
    heads = ("model", "way", "TTFT ms", "x", "% matmul", "tokens/s", "x", "% copy", "peak GB")
    title = f"{name}, batch {batch}, prompt of {found['prompt_tokens']} tokens"
    table = Table(*heads, title=title)
    for row in found["rows"]:
        keys = (
            "ttft_wall_ms",
            "ttft_ratio_to_dense_sdpa",
            "percent_of_matmul",
            "decode_tokens_per_s",
            "decode_ratio_to_dense_sdpa",
            "percent_of_copy",
            "peak_gb",
        )
        cells = ("" if row.get(key) is None else f"{row[key]:.4g}" for key in keys)
        table.add_row(row["pruned"], row["way"], *cells)
    console.print(table)
    for what, reason in found["left_out"].items():
        console.print(f"left out: {what}: {reason}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--models", nargs="+", choices=sorted(SIZES), help="not the preset's")
    parser.add_argument("--batch", nargs="+", type=int, help="not the preset's")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="not the preset's")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--tokens", type=int, help="generated after the first")
    parser.add_argument("--rounds", type=int, help="turns of every contender")
    parser.add_argument("--repeats", type=int, help="calls in a turn")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="not the preset's")
    parser.add_argument("--budget", type=float, help="seconds; what does not fit is left out")
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Time what the command line asks for; return the number of models that failed."""
    arguments, console = _arguments(argv), Console()
    preset = PRESETS[arguments.preset]
    device = torch.device(arguments.device or preset.device)
    preset = Preset(
        device.type,
        tuple(arguments.models or preset.models),
        tuple(arguments.batch or preset.batches),
        arguments.tokens or preset.tokens,
        arguments.rounds or preset.rounds,
        arguments.repeats or preset.repeats,
        tuple(arguments.ways or preset.ways),
    )
    start, failed = time.monotonic(), 0
    dtype = DTYPES[arguments.dtype]
    effort, clock = FULL[device.type], clock_for(device)
    ceilings = measure_ceilings(device, dtype, clock, effort)
    bench = Bench(Setup.seeded(device, dtype), clock, effort, ceilings)
    record = results.run_record("e2e", bench, {k: str(v) for k, v in vars(arguments).items()})
    record["timing"] = {
        "clock": "perf_counter and process_time around generate",
        "rounds": preset.rounds,
        "repeats": preset.repeats,
        "tokens": preset.tokens,
    }
    records = [record]
    folder = arguments.output or results.results_folder(device)
    path = folder / f"e2e-{arguments.preset}-{results.today()}.jsonl"
    for number, name in enumerate(preset.models):
        size = SIZES[name]
        left = (arguments.budget or float("inf")) - (time.monotonic() - start)
        end = time.monotonic() + left / (len(preset.models) - number)
        try:
            models = {"dense": build(size, device, dtype)}
            models["25 % dropped"] = without_a_quarter(models["dense"])
            report = il.fuse(models["dense"])
            il.unfuse(models["dense"])
            records.append({"kind": "report", "model": name, "report": str(report).splitlines()})
            for place, batch in enumerate(preset.batches):
                share = (end - time.monotonic()) / (len(preset.batches) - place)
                limit = time.monotonic() + share
                found = time_model(size, batch, models, preset, bench, limit)
                records.append({"kind": "e2e", "model": name, "batch": batch, **found})
                show(name, batch, found, console)
                # an interrupted run keeps what it has
                results.write_lines(path, records)
        # the other models are still worth timing
        except Exception as error:  # noqa: BLE001
            failed += 1
            console.print(f"{name} raised {first_line(error)}")
            records.append({"kind": "left_out", "model": name, "reason": first_line(error)})
            results.write_lines(path, records)
        models = {}
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
