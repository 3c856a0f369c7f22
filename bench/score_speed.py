"""One-pass scoring against the published procedure: python bench/score_speed.py [--quick].

Both score the same Qwen3-VL with random weights on the same prompts, each an image and a question,
in one run, in turn, round after round. The published procedure is written out below as its authors
run it: one pass over the data per pack (1, 2 and 3), one sample at a time, logits, KV cache and all
hidden states kept. Ours is `interlace.score`.

Speed is the median over rounds, by the wall clock and by the processor time of the process; the
second does not see other programs of the machine. Extra memory is the highest sum of what torch's
allocator had given out during scoring, beyond weights and inputs: exact and the same in every run,
unlike the resident size, which keeps what was freed. On the CPU it is read off the allocation
events of torch.profiler in a run of its own, on the longest prompts. As in any such loop, what one
forward pass gave lives on until the next has given its own.

The shape keeps the proportions of Qwen3-VL-8B: 36 layers, 4 query heads per KV head, feed-forward
three times as wide, a head as large against the layers, and DeepStack.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
import transformers
from torch.profiler import ProfilerActivity, profile

import interlace as il
from interlace.records import Provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PACKS = (1, 2, 3)
IMAGE, VISION_START, VISION_END, FIRST_WORD = 4, 6, 7, 10
PATCH, MERGE, DEEPSTACK = 8, 2, (1, 2, 3)

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of the data."""

    num_layers: int
    hidden: int
    vocabulary: int
    image_side: int
    words: tuple[int, int]
    num_samples: int
    rounds: int


FULL = Size(36, 384, 12288, 128, (32, 96), 16, 5)
QUICK = Size(36, 256, 8192, 96, (16, 64), 8, 3)


def build_model(size: Size) -> Any:
    """A Qwen3-VL with random weights."""
    heads = 8
    head_dim = size.hidden // heads
    turned = head_dim // 2
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": 3 * size.hidden,
            "num_hidden_layers": size.num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 4,
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [turned - 2 * (turned // 3), turned // 3, turned // 3],
                "mrope_interleaved": True,
            },
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 6,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "patch_size": PATCH,
            "temporal_patch_size": 1,
            "spatial_merge_size": MERGE,
            "out_hidden_size": size.hidden,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": list(DEEPSTACK),
        },
        image_token_id=IMAGE,
        video_token_id=5,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    torch.manual_seed(0)
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


def make_samples(size: Size) -> list[Inputs]:
    """Prompts of unequal length, longest first, as `score` orders samples."""
    generator = torch.Generator().manual_seed(1)
    side = size.image_side // PATCH
    lengths = torch.randint(*size.words, (size.num_samples,), generator=generator).tolist()
    samples = []
    for length in sorted(lengths, reverse=True):
        words = torch.randint(FIRST_WORD, size.vocabulary, (length,), generator=generator)
        image = [VISION_START, *[IMAGE] * (side // MERGE) ** 2, VISION_END]
        ids = torch.tensor([[*words[:4].tolist(), *image, *words[4:].tolist()]])
        samples.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": torch.randn(side * side, 3 * PATCH * PATCH, generator=generator),
                "image_grid_thw": torch.tensor([[1, side, side]]),
            }
        )
    return samples


def padded(samples: Sequence[Inputs]) -> Inputs:
    """One batch, padded on the left as prompts are."""
    width = max(sample["input_ids"].shape[1] for sample in samples)
    batch: Inputs = {}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        rows = [functional.pad(s[name], (width - s[name].shape[1], 0)) for s in samples]
        batch[name] = torch.cat(rows)
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([sample[name] for sample in samples])
    return batch


def published(model: Any, samples: Sequence[Inputs]) -> dict[int, list[float]]:
    """Score every pack in a pass of its own, one sample at a time, with all hidden states."""
    num_layers = len(model.model.language_model.layers)
    scores = {}
    for pack in PACKS:
        similarities: list[list[float]] = [[] for _ in range(num_layers - pack)]
        for inputs in samples:
            with torch.no_grad():
                outputs = model(**inputs, output_hidden_states=True)
            states = outputs.hidden_states
            for i, values in enumerate(similarities):
                first, second = states[i].squeeze(0), states[i + pack].squeeze(0)
                values.append(functional.cosine_similarity(first, second, dim=1).mean().item())
        scores[pack] = [sum(values) / len(values) for values in similarities]
    return scores


def ours(vlm: Any, batches: Sequence[Inputs]) -> dict[int, list[float]]:
    """Score in one pass."""
    scores = il.score(vlm, batches, packs=PACKS, towers=("text",), progress=False)
    return {pack: list(scores["text"].packs(pack)) for pack in PACKS}


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that the allocator had given out at once while `run` ran."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def clocked(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def disagreement(one: dict[int, list[float]], other: dict[int, list[float]]) -> float:
    """Largest difference of scores behind the layers that DeepStack adds image features to.

    For the states in front, transformers 5 hands out what a layer gave before the features were
    added, while the next layer, and `score`, sees them added.
    """
    behind = len(DEEPSTACK) + 1
    return max(
        abs(a - b)
        for pack in PACKS
        for a, b in zip(one[pack][behind:], other[pack][behind:], strict=True)
    )


def compare(size: Size, batch_sizes: Sequence[int]) -> dict[str, Any]:
    """Measure memory once, then speed in rounds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(size).to(device)
    vlm = il.open_model(model)
    samples = [{k: v.to(device) for k, v in sample.items()} for sample in make_samples(size)]
    runs: dict[str, Callable[[], Any]] = {"published": lambda: published(model, samples)}
    for count in batch_sizes:
        starts = range(0, len(samples), count)
        batches = [padded(samples[start : start + count]) for start in starts]
        runs[f"one pass, batch {count}"] = lambda batches=batches: ours(vlm, batches)
    found = {name: run() for name, run in runs.items()}
    apart = {name: disagreement(found["published"], each) for name, each in found.items()}
    # the peak is reached within one sample or batch, the longest, which stands first
    short: dict[str, Callable[[], Any]] = {"published": lambda: published(model, samples[:1])}
    for count in batch_sizes:
        batch = padded(samples[:count])
        short[f"one pass, batch {count}"] = lambda batch=batch: ours(vlm, [batch])
    memory = {name: peak_bytes(run) for name, run in short.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(size.rounds):
        for name, run in runs.items():
            seconds[name].append(clocked(run))
        print(f"round {number + 1} of {size.rounds} done", flush=True)
    rows = {}
    for name, times in seconds.items():
        wall = statistics.median(wall for wall, _ in times)
        processor = statistics.median(processor for _, processor in times)
        rows[name] = {
            "samples_per_second": len(samples) / wall,
            "samples_per_processor_second": len(samples) / processor,
            "extra_bytes": memory[name],
            "largest_score_difference": apart[name],
            "rounds_seconds": [[round(each, 4) for each in pair] for pair in times],
        }
    base = rows["published"]
    for row in rows.values():
        for key in ("samples_per_second", "samples_per_processor_second"):
            row[f"{key}_ratio"] = row[key] / base[key]
        row["extra_bytes_ratio"] = row["extra_bytes"] / base["extra_bytes"]
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    return {"rows": rows, "tokens_per_sample": lengths, "parameters": vlm.num_parameters()}


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':20} samples/s   ratio  per CPU s   ratio  extra MB   ratio  difference"]
    for name, row in rows.items():
        lines.append(
            f"{name:20} {row['samples_per_second']:9.2f} {row['samples_per_second_ratio']:6.2f}x"
            f" {row['samples_per_processor_second']:10.2f}"
            f" {row['samples_per_processor_second_ratio']:6.2f}x {row['extra_bytes'] / 1e6:9.2f}"
            f" {row['extra_bytes_ratio']:6.2f}x {row['largest_score_difference']:11.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller, about a minute")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, help="processor threads; default: torch's choice")
    parser.add_argument("--output", type=Path, help="JSON file; default: under bench/results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    size = QUICK if arguments.quick else FULL
    load_before = os.getloadavg()
    measured = compare(size, arguments.batch_sizes)
    provenance = Provenance.collect(seed=0)
    result = {
        "benchmark": "score_speed",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "size": vars(size),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load_average": [round(load_before[0], 2), round(os.getloadavg()[0], 2)],
        "provenance": vars(provenance),
        **measured,
    }
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    name = "score_speed_quick.json" if arguments.quick else "score_speed.json"
    path = arguments.output or Path(__file__).parent / "results" / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(measured["rows"]))
    print(f"load average {result['load_average']}, {result['threads']} threads; written to {path}")


if __name__ == "__main__":
    main()
