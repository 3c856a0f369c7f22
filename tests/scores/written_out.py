"""Tiny models and their inputs, padded or one by one; what the published code does, written out."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

# loaded later, its default arguments would hold the group, whose threads can abort at the end
import torch.distributed.nn
import torch.nn.functional as functional
from tiny import TINY, tiny_inputs

from interlace.errors import DataError
from interlace.models import VLM, family_of
from interlace.scores import METRICS, score

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from interlace.records import Scores, TowerScores

# fp32 sums in another order
TOLERANCE = 2e-6


@functools.cache
def opened(name: str) -> VLM:
    model = TINY[name]()
    return VLM(model, family_of(model), name=name)


def batch_of(name: str, num_samples: int = 3) -> dict[str, torch.Tensor]:
    """A padded batch of prompts of unequal length."""
    return tiny_inputs(name, opened(name).model, batch=num_samples)


def labelled(name: str, num_samples: int = 3) -> dict[str, torch.Tensor]:
    """The same with labels, where the loss needs them: of the words, not of image placeholders."""
    batch = batch_of(name, num_samples)
    vlm = opened(name)
    if vlm.family.objective != "contrastive" and "labels" not in batch:
        words = (batch["attention_mask"] == 1) & (batch["input_ids"] < 100)
        batch["labels"] = batch["input_ids"].masked_fill(~words, -100)
    return batch


@contextlib.contextmanager
def skipped(layer: nn.Module) -> Iterator[None]:
    """Let a layer hand on what it is given, in a whole forward pass."""
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def one_by_one(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The samples of a padded batch, each by itself and without padding."""
    num_samples = batch["input_ids"].shape[0]
    decoder = batch.get("decoder_attention_mask")
    grid = batch.get("image_grid_thw")
    singles = []
    for row in range(num_samples):
        single = {}
        for key, value in batch.items():
            mask = decoder if key.startswith("decoder") or key == "labels" else None
            own_labels = key == "labels" and decoder is None
            if key in ("input_ids", "attention_mask", "mm_token_type_ids") or own_labels:
                mask = batch.get("attention_mask")
            if key == "pixel_values" and grid is not None:
                single[key] = value.split(grid.prod(-1).tolist())[row]
            elif mask is not None:
                single[key] = value[row][mask[row].bool()][None]
            else:
                single[key] = value[row : row + 1]
        singles.append(single)
    return singles


def published(model: Any, singles: Sequence[dict[str, torch.Tensor]], pack: int) -> list[float]:
    """INTERLACE's scoring: one pass per pack, one sample at a time, all hidden states kept."""
    num_layers = model.config.text_config.num_hidden_layers
    means: list[list[float]] = [[] for _ in range(num_layers - pack)]
    for inputs in singles:
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        for i, values in enumerate(means):
            cosine = functional.cosine_similarity(states[i][0], states[i + pack][0], dim=1)
            values.append(cosine.mean().item())
    return [sum(values) / len(values) for values in means]


def farthest(one: TowerScores, other: TowerScores) -> float:
    """The largest difference between any two entries of two towers' tables, tails included."""
    assert one.similarity.keys() == other.similarity.keys()
    assert one.num_tokens == other.num_tokens
    assert one.num_samples == other.num_samples
    distances = []
    for group, packs in one.similarity.items():
        for pack, values in packs.items():
            others = other.similarity[group][pack]
            distances += [abs(a - b) for a, b in zip(values, others, strict=True)]
            distances.append(abs(one.tail[group][pack] - other.tail[group][pack]))
    assert distances
    return max(distances)


def parts_of_the_whole() -> list[dict[str, torch.Tensor]]:
    """Four labelled batches of a chat model; one has text alone."""
    parts = one_by_one(labelled("qwen3_vl", 4))
    text_only = {key: parts[1][key] for key in ("input_ids", "attention_mask", "labels")}
    text_only["input_ids"] = text_only["input_ids"].clamp(max=99)
    parts[1] = text_only
    return parts


def every_metric(parts: Sequence[dict[str, torch.Tensor]]) -> Scores:
    """All metrics of a tiny chat model."""
    metrics = tuple(METRICS)
    measure = {(): 1.0}
    return score(
        opened("qwen3_vl"),
        parts,
        metrics=metrics,
        num_directions=1,
        measure=lambda tower, gone: measure.get(gone, len(tower) / (1 + sum(gone))),
        progress=False,
    )


def in_turn(parts: Sequence[dict[str, torch.Tensor]]) -> Scores:
    """What heads and neurons of a tiny chat model cost one after the other."""
    return score(opened("qwen3_vl"), parts, metrics=("head_obs", "ffn_obs"), progress=False)


def _join(rank: int, folder: str) -> None:
    """Join the other one of two processes."""
    torch.set_num_threads(1)
    store = Path(folder) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def _leave() -> None:
    """Leave the other one, with none of the threads that talked to it left behind."""
    dist.destroy_process_group()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads


def score_in_process(rank: int, folder: str) -> None:
    """One of two processes: scores all metrics, a tower that only the first one runs, and data
    that breaks in the second one alone.
    """
    _join(rank, folder)
    vlm, parts = opened("qwen3_vl"), parts_of_the_whole()
    (Path(folder) / f"all-{rank}.json").write_text(every_metric(parts).to_json())
    # it writes into its output, so it cannot be replayed
    handle = vlm.towers["vision"].layers[0].register_forward_hook(lambda *call: call[2].mul_(1))
    noted = score(vlm, parts[:2], metrics=("relevance",), progress=False)
    (Path(folder) / f"noted-{rank}.json").write_text(noted.to_json())
    handle.remove()
    (Path(folder) / f"turns-{rank}.json").write_text(in_turn(parts).to_json())
    parts[3]["pixel_values"] = torch.full_like(parts[3]["pixel_values"], float("nan"))
    try:
        score(vlm, parts, progress=False)
    except DataError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))
    _leave()
