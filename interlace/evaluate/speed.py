"""Speed: time to the first token, tokens per second after it, parameters, memory.

Models that are compared take turns within every round of one run, so that a busy machine slows all
of them alike. Medians are the metrics; the 20th and 80th percentiles stand in the details.
Preparing the inputs is not timed.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from interlace._progress import track
from interlace.evaluate._common import TaskResult, held_still
from interlace.evaluate.embeddings import image_batch, text_batch
from interlace.evaluate.generate import GREEDY, prompt_batch
from interlace.evaluate.retrieval import check_captions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from interlace.data.samples import Sample
    from interlace.evaluate._common import Options
    from interlace.models.handle import VLM

__all__ = ["LOWER_IS_BETTER", "measure"]

LOWER_IS_BETTER = frozenset({"prefill_seconds", "num_parameters", "peak_memory_bytes"})
ROUNDS = 7
MOST_NEW_TOKENS = 32
SAMPLE_SECONDS = 0.001

Readings = dict[str, float]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes the time after every new token; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        _wait(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _longest(vlm: VLM, batch: dict[str, Any], wanted: int) -> int:
    """New tokens to time: at least 2, and no more than the text tower has positions for."""
    config = vlm.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    prompt = batch["input_ids"].shape[1] if "input_ids" in batch else 1
    room = positions - prompt - 1 if isinstance(positions, int) else wanted
    return max(2, min(wanted, MOST_NEW_TOKENS, room))


def _generator(vlm: VLM, samples: Sequence[Sample], wanted: int) -> tuple[Any, dict[str, Any]]:
    batch = prompt_batch(vlm, samples)
    new_tokens = _longest(vlm, batch, wanted)

    def once() -> Readings:
        clock = _Clock(vlm.device)
        _wait(vlm.device)
        start = time.perf_counter()
        vlm.model.generate(
            **batch,
            **GREEDY,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        steps = len(clock.times) - 1
        elapsed = max(clock.times[-1] - clock.times[0], 1e-9)
        return {
            "prefill_seconds": clock.times[0] - start,
            "decode_tokens_per_second": steps * len(samples) / elapsed,
        }

    return once, {"new_tokens": new_tokens, **_token_counts(vlm, batch)}


def _encoder(vlm: VLM, samples: Sequence[Sample]) -> tuple[Any, dict[str, Any]]:
    check_captions(samples)
    images = image_batch(vlm, samples)
    texts = text_batch(vlm, [sample.references[0] for sample in samples])

    def seconds(call: Callable[[], Any]) -> float:
        _wait(vlm.device)
        start = time.perf_counter()
        call()
        _wait(vlm.device)
        return max(time.perf_counter() - start, 1e-9)

    def once() -> Readings:
        image_seconds = seconds(lambda: vlm.model.get_image_features(**images))
        text_seconds = seconds(lambda: vlm.model.get_text_features(**texts))
        return {
            "images_per_second": len(samples) / image_seconds,
            "texts_per_second": len(samples) / text_seconds,
        }

    return once, _token_counts(vlm, texts)


def _token_counts(vlm: VLM, batch: dict[str, Any]) -> dict[str, Any]:
    """Image and text tokens of the whole batch, padding left out."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    num_text = 0
    if ids is not None:
        num_text = int(ids.numel() if mask is None else mask.sum())
    marker = vlm.family.image_token_id(vlm.model)
    if ids is not None and marker is not None:
        num_images = int((ids == marker).sum())
        return {"num_image_tokens": num_images, "num_text_tokens": num_text - num_images}
    vision = getattr(vlm.model.config, "vision_config", None)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    counts: dict[str, Any] = {"num_text_tokens": num_text}
    if isinstance(side, int) and isinstance(patch, int):
        rows = len(next(iter(batch.values())))
        counts["num_image_tokens"] = rows * (side // patch) ** 2
    return counts


def _weight_bytes(model: nn.Module) -> int:
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    # without /proc only the highest value so far is known: in bytes on macOS, else in KiB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _return_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _memory_increase(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call needs at its peak on top of what is there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # what earlier work freed but kept would hide what this call needs
    _return_free_memory()
    before = _resident_bytes()
    highest = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            highest.append(max(highest.pop(), _resident_bytes()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(highest[-1], _resident_bytes()) - before


def _memory_words(device: torch.device) -> str:
    if device.type == "cuda":
        return "weights + increase of allocated CUDA memory at its peak"
    every = f"{SAMPLE_SECONDS * 1e3:g} ms"
    return f"weights + increase of the process's resident memory, read every {every}"


def _result(
    vlm: VLM, readings: Sequence[Readings], memory: int, details: dict[str, Any]
) -> TaskResult:
    metrics: dict[str, float] = {}
    spread: dict[str, dict[str, float]] = {}
    for name in readings[0]:
        values = [reading[name] for reading in readings]
        metrics[name] = statistics.median(values)
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        spread[name] = {"p20": cuts[0], "p80": cuts[-1]}
    metrics["num_parameters"] = float(vlm.num_parameters())
    metrics["peak_memory_bytes"] = float(_weight_bytes(vlm.model) + memory)
    shared = {
        "rounds": len(readings),
        "device": str(vlm.device),
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "memory": _memory_words(vlm.device),
        "weight_bytes": _weight_bytes(vlm.model),
    }
    return TaskResult(metrics, {**details, "spread": spread, **shared})


def measure(
    models: Sequence[VLM], samples: Sequence[Sample], options: Options, *, rounds: int = ROUNDS
) -> list[TaskResult]:
    """Time models against each other on one batch.

    The batch holds the first `options.batch_size` samples. Models that write text:
    "prefill_seconds" from pixels and prompt to the first new token of the whole batch, and
    "decode_tokens_per_second" over the batch after it, with a KV cache; up to 32 new tokens, end
    tokens held back. Models that embed: "images_per_second" and "texts_per_second". All:
    "num_parameters" and "peak_memory_bytes" (weights of this model plus what the run adds).

    Args:
        models: at least one, all of one family.
        samples: what to run them on, at least one.
        options: batch size and longest answer.
        rounds: timed runs per model, at least 2, after one that warms up and reads the memory.

    Returns:
        One result per model, in order; details name token counts, spread, device and conventions.
    """
    chosen = [samples[index] for index in range(min(options.batch_size, len(samples)))]
    runs, details = [], []
    for vlm in models:
        if vlm.family.objective == "contrastive":
            once, detail = _encoder(vlm, chosen)
        else:
            once, detail = _generator(vlm, chosen, options.max_new_tokens)
        runs.append(once)
        details.append({"batch_size": len(chosen), **detail})
    readings: list[list[Readings]] = [[] for _ in models]
    with held_still(*(vlm.model for vlm in models)):
        memory = [
            _memory_increase(once, vlm.device) for once, vlm in zip(runs, models, strict=True)
        ]
        for turn in track(range(rounds), description="timing"):
            order = range(len(models)) if turn % 2 == 0 else reversed(range(len(models)))
            for index in order:
                readings[index].append(runs[index]())
    return [
        _result(vlm, readings[index], memory[index], details[index])
        for index, vlm in enumerate(models)
    ]
