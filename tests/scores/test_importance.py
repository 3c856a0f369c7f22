"""All metrics together: one record, split over samples, metrics and processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch.multiprocessing as mp
from scores.written_out import (
    every_metric,
    farthest,
    in_turn,
    opened,
    parts_of_the_whole,
    score_in_process,
)

from interlace.records import Scores
from interlace.scores import METRICS, score
from interlace.scores.probes import Probes
from interlace.scores.relevance import Relevance

if TYPE_CHECKING:
    from pathlib import Path

OTHERS = tuple(name for name in METRICS if name != "similarity")


def _equal(one: Scores, other: Scores) -> None:
    assert one.towers.keys() == other.towers.keys()
    for tower, scores in one.towers.items():
        assert scores.metrics.keys() == other[tower].metrics.keys()
        for name, values in scores.metrics.items():
            assert other[tower].metrics[name] == pytest.approx(values, rel=1e-10, abs=1e-12)
        assert scores.group_samples == other[tower].group_samples
        assert scores.num_samples == other[tower].num_samples


def test_two_processes_give_what_one_gives_and_fail_together(tmp_path: Path) -> None:
    mp.spawn(score_in_process, args=(str(tmp_path),), nprocs=2)
    one = every_metric(parts_of_the_whole())
    assert set(one["text"].metrics) == set(OTHERS)
    for rank in (0, 1):
        all_of_them = Scores.from_json((tmp_path / f"all-{rank}.json").read_text())
        _equal(one, all_of_them)
        assert max(farthest(all_of_them[tower], one[tower]) for tower in one.towers) < 1e-12
        noted = Scores.from_json((tmp_path / f"noted-{rank}.json").read_text())
        assert noted["vision"].notes[0].startswith("no replay")
        assert noted["text"].notes == ()
    turns = in_turn(parts_of_the_whole())
    for rank in (0, 1):
        two = Scores.from_json((tmp_path / f"turns-{rank}.json").read_text())
        for tower in turns.towers:
            for metric, sites in turns[tower].importance.items():
                for site, rows in sites.items():
                    for row, other in zip(rows, two[tower].importance[metric][site], strict=True):
                        assert other == pytest.approx(row, rel=1e-2, abs=1e-2 * max(row))
    messages = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0].startswith("Process 1 of 2 failed, so process 0 stops: ")
    assert all("'vision', batch 3" in message for message in messages)


def test_one_record_holds_all_and_parts_of_the_samples_merge() -> None:
    parts = parts_of_the_whole()
    whole = every_metric(parts)
    assert Scores.from_json(whole.to_json()) == whole
    assert whole["text"].group_samples["relevance"] == 4
    assert whole["text"].group_samples["alignment"] == 3
    # the sample without an image ran no vision tower
    assert whole["vision"].group_samples["relevance"] == 3
    merged = Scores.merge(every_metric(parts[:1]), every_metric(parts[1:]))
    for tower in whole.towers:
        for name in set(OTHERS) - {"task_relevance"}:
            if name in whole[tower].metrics:
                values = whole[tower].metrics[name]
                assert merged[tower].metrics[name] == pytest.approx(values, rel=1e-10, abs=1e-12)
    assert merged["text"].alignment == whole["text"].alignment


def test_metrics_scored_apart_merge_into_one_record() -> None:
    vlm, parts = opened("qwen3_vl"), parts_of_the_whole()
    names = ("similarity", "relevance", "alignment")
    apart = Scores.merge(*(score(vlm, parts, metrics=(name,), progress=False) for name in names))
    together = score(vlm, parts, metrics=names, progress=False)
    _equal(together, apart)
    assert apart["vision"].similarity == together["vision"].similarity
    assert apart["text"].alignment == together["text"].alignment
    assert apart["vision"].notes == together["vision"].notes


def test_the_bar_says_what_a_sample_costs() -> None:
    vlm = opened("clip")
    towers = {"text": vlm.towers["text"]}
    text, vision = (
        sum(p.numel() for layer in vlm.towers[name].layers for p in layer.parameters())
        for name in ("text", "vision")
    )
    # 15 of 6 x 6 layers, and one pass that is recorded
    cost = 1 + 15 / 6 * text / (text + vision)
    probes = Probes(vlm, towers, {"relevance": Relevance}, 4)
    assert probes.description() == f"relevance (about {cost:.1f} forward passes per sample)"
