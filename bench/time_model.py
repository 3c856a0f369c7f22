"""Whether splits take the time that they are counted in: python bench/time_model.py [--small].

`il.split_plan(..., fixed_time=f)` lets a layer take f of its time at any width and the rest by its
parameters. f comes from `il.fixed_time`, which times a model without half of its layers and one
with half of its heads and neurons. Here other mixes of both are timed beside the whole model, in
turns, in one run: the share of the layers' time that is gone as counted, and as measured. The model
is the bundled Qwen3-VL, wider and with random weights; time does not depend on what they say.
"""

from __future__ import annotations

import argparse
import copy
import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import Cells
from e2e_models import evenly

import interlace as il
from interlace._records.shape import FFN_MULTIPLE
from interlace.evaluate._common import Options
from interlace.evaluate.speed import measure
from interlace.records import Plan, TowerPlan

# text tower: layers, hidden size, neurons, query heads, KV heads, size of a head
SIZES = {"small": (6, 256, 512, 8, 4, 32), "full": (16, 1024, 3072, 16, 8, 64)}
# share of the layers that go, of the KV groups and of the neurons of the others
MIXES = (
    (0.5, 0, 0),
    (0.25, 0, 0),
    (0, 0.25, 0.25),
    (0, 0.25, 0.75),
    (0.25, 0.5, 0.5),
    (0.5, 0.25, 0.5),
)
HEAD = "phase", "batch", "fixed", "layers gone", "parameters gone", "counted", "measured", "speed"
RATES = {"prefill": "prefill_seconds", "decode": "decode_tokens_per_second"}


def build(size: str, device: str = "cpu") -> il.models.VLM:
    """Make the bundled Qwen3-VL in another size, with random weights, in fp32."""
    stock = il.open_model("bundled:qwen3-vl")
    layers, hidden, neurons, heads, groups, width = SIZES[size]
    config = copy.deepcopy(stock.model.config)
    text = config.text_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = layers, hidden, neurons
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = heads, groups, width
    third = width // 6
    text.rope_parameters["mrope_section"] = [width // 2 - 2 * third, third, third]
    config.vision_config.out_hidden_size = hidden
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    return il.open_model(model, processor=stock.processor, device=device)


def cut(vlm: Any, mix: tuple[float, float, float]) -> tuple[Any, float, float]:
    """Return the student of a mix, the share of layers that stay and of parameters in those."""
    shape = vlm.shape().towers["text"]
    number = shape.num_layers
    drop = evenly(vlm, round(mix[0] * number))
    kept = [layer for layer in range(number) if layer not in drop]
    units: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, site in shape.sites.items():
        share = mix[1] if site.kind == "heads" else mix[2]
        groups = site.groups[0]
        if site.kind == "heads":
            gone = sum(groups[: round(share * len(groups))])
        else:
            gone = round(share * sum(groups) / FFN_MULTIPLE) * FFN_MULTIPLE
        if gone:
            units[name] = {layer: tuple(range(gone)) for layer in kept}
    plan = TowerPlan(number, drop=drop, cut=units)
    left = shape.narrowed(units).without(drop).layer_parameters
    student = il.prune(vlm, Plan({"text": plan}, standard=False))
    return student, len(kept) / number, sum(left) / sum(shape.layer_parameters)


def compare(vlm: Any, phase: Any, batch: int, rounds: int) -> dict[str, Any]:
    """Return what is counted and measured of every mix."""
    data = il.samples("scenes", count=batch, tasks=("vqa",), seed=0)
    fixed = il.fixed_time(vlm, data, phase=phase, batch_size=batch, rounds=rounds)["text"]
    students = [cut(vlm, mix) for mix in MIXES]
    options = Options(batch_size=batch, max_new_tokens=32)
    found = measure([vlm, *(each[0] for each in students)], data, options, rounds=rounds)
    rates = [result.metrics[RATES[phase]] for result in found]
    whole, *times = rates if phase == "prefill" else [1 / rate for rate in rates]
    # the first mix drops layers alone
    layers = (whole - times[0]) / (1 - students[0][1])
    rows = []
    for (_, kept, left), seconds in zip(students, times, strict=True):
        counted = 1 - fixed * kept - (1 - fixed) * left
        rows.append(
            {
                "fixed_time": fixed,
                "layers_gone": 1 - kept,
                "parameters_gone": 1 - left,
                "counted": counted,
                "measured": (whole - seconds) / layers,
                "speedup": whole / seconds,
            }
        )
    return {"mixes": rows}


def main() -> None:
    """Measure, keep what is known, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small model and few rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", type=Path, default=Path("time-model.jsonl"), help="results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    vlm = build("small" if arguments.small else "full", arguments.device)
    cells = Cells(arguments.output, small=arguments.small)
    rounds = 2 if arguments.small else 7
    print("| " + " | ".join(HEAD) + " |")
    print("| --- " * len(HEAD) + "|")
    for phase in RATES:
        for batch in (1, 16):
            cell = [phase, batch]
            cells.keep(cell, functools.partial(compare, vlm, phase, batch, rounds))
            for row in (cells.get(cell) or {})["mixes"]:
                shown = (f"{value:.2f}" for value in row.values())
                print("|", phase, "|", batch, "|", " | ".join(shown), "|", flush=True)


if __name__ == "__main__":
    main()
