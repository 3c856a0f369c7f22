"""The retention benchmark around its methods: cells, their order, shards, tables and the chart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import retention
import torch
from cells import Cells, read
from methods import COMPARED
from PIL import Image
from presets import PRESETS
from retention import Bench, Job, jobs_of, measure_all, parse
from retention_chart import plot, points
from retention_report import summary, table
from subjects import (
    CROWDED_SUBJECTS,
    SUBJECTS,
    answers,
    measure,
    open_subject,
    train_samples,
    trained_on,
)
from subjects import test_samples as held_out

from interlace.data.collate import Collator
from interlace.errors import DataError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable

EARLIER = Path(__file__).parents[2] / "bench/results/cpu/retention-small.jsonl"


class NoBench(Bench):
    """Knows the depths of the models, and measures nothing."""

    def __init__(self) -> None:
        depths = {"qwen3-vl": 16, "clip": 12, "blip": 12}
        self.model = lambda name: SimpleNamespace(
            towers={
                tower: SimpleNamespace(num_layers=depths[name]) for tower in SUBJECTS[name].towers
            }
        )

    def dense(self, name: str) -> dict[str, Any]:
        return {}

    def retention(self, *_: Any) -> dict[str, Any]:
        return {}

    def speed(self, *_: Any) -> dict[str, Any]:
        return {}


@pytest.fixture
def all_jobs() -> Callable[..., list[Job]]:
    def make(preset: str, bridges: tuple[str, ...] = ("none",), speed: str = "yes") -> list[Job]:
        return list(jobs_of(NoBench(), PRESETS[preset], list(bridges), speed=speed))

    return make


def test_earlier_results_are_read_and_continued(all_jobs: Any) -> None:
    rows = read(EARLIER)
    assert len(rows) == 123
    shown = table(rows)
    assert "| 25% of the layers | CLIP R@1, image to text |" in shown
    assert "`sleb` + fold" in shown
    known = {json.dumps(row["cell"]) for row in rows}
    wanted = {json.dumps(job.cell) for job in all_jobs("small", ("none", "fold"))}
    assert known <= wanted


def test_cells_of_a_seed_come_before_those_of_the_next(all_jobs: Any) -> None:
    cells = [job.cell for job in all_jobs("full", speed="no") if job.cell[1] != "dense"]
    seeds = [cell[3] for cell in cells]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1, 2}
    first = {tuple(cell[:3]) for cell in cells if cell[3] == 0}
    assert {method for _, method, _ in first} == set(COMPARED)
    assert len(first) == len(cells) / 3


@pytest.mark.parametrize("name", ["qwen3-vl-crowded", "blip-crowded"])
def test_models_of_crowded_scenes_solve_them(name: str) -> None:
    subject = SUBJECTS[name]
    assert subject in CROWDED_SUBJECTS
    vlm = open_subject(name)
    test = held_out(subject, vlm, 48)
    for samples in test.values():
        assert min(len(each.images[0].scene.objects) for each in samples) > 6
    found = measure(subject, vlm, test)
    assert found["caption/cider"] > 9.0
    assert found.get("vqa/accuracy", 1.0) > 0.85
    # one percent of the scenes that it was trained on since
    healing = train_samples(subject, vlm, 0, 1, 0.01)
    assert len(healing) == {"qwen3-vl-crowded": 528, "blip-crowded": 960}[name]


def test_more_are_held_out_for_clip_alone() -> None:
    asked: dict[str, int] = {}
    bench = Bench(PRESETS["crowded"].sizes)
    bench.model = lambda name: SimpleNamespace(processor=None)
    for subject in CROWDED_SUBJECTS:
        asked[subject.name] = {len(each) for each in bench._test(subject.name).values()}.pop()
    assert asked == {"qwen3-vl-crowded": 256, "blip-crowded": 256, "clip-2048": 2048}
    # the bundled model is the one that is measured
    assert trained_on(SUBJECTS["clip-2048"]) == trained_on(SUBJECTS["clip"])


def test_two_shards_share_all_cells_and_keep_units_together(all_jobs: Any, tmp_path: Any) -> None:
    jobs = all_jobs("full")
    shares = []
    for number in (0, 1):
        cells = Cells(tmp_path / f"{number}.jsonl")
        measure_all(iter(jobs), cells, (number, 2))
        shares.append([row["cell"] for row in read(cells.path)])
    assert sorted(map(json.dumps, shares[0] + shares[1])) == sorted(
        json.dumps(job.cell) for job in jobs
    )
    assert min(map(len, shares)) > 0.4 * len(jobs)
    units = {json.dumps(job.cell): job.unit for job in jobs}
    both = [{units[json.dumps(cell)] for cell in share} for share in shares]
    assert not both[0] & both[1]


def test_merge_takes_what_is_missing(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    Cells(paths[0]).keep(["m", "dense"], lambda: {"raw": {"t/x": 0.5}})
    Cells(paths[1]).keep(["m", "dense"], lambda: {"raw": {"t/x": 0.7}})
    Cells(paths[1]).keep(["m", "last", 0.25, 0], lambda: {"raw": {"t/x": 0.25}})
    retention.main(["--output", str(paths[0]), "--merge", str(paths[1])])
    assert [row["raw"] for row in read(paths[0])] == [{"t/x": 0.5}, {"t/x": 0.25}]


def test_fractions_of_equal_counts_are_measured_once(all_jobs: Any, tmp_path: Path) -> None:
    jobs = {json.dumps(job.cell): job for job in all_jobs("full")}
    # 10 % and 15 % of 12 layers are one layer, of 16 they are one and two
    assert jobs['["clip", "last", 0.15, 1]'].same_as == (["clip", "last", 0.1, 1],)
    assert jobs['["qwen3-vl", "last", 0.15, 1]'].same_as == ()
    asked: list[float] = []

    def job(fraction: float) -> Job:
        job = jobs[f'["clip", "last", {fraction}, 1]']
        return replace(job, make=lambda: asked.append(fraction) or {"raw": {"t/x": fraction}})

    cells = Cells(tmp_path / "cells.jsonl")
    measure_all(iter([job(0.1), job(0.15), job(0.25)]), cells)
    assert asked == [0.1, 0.25]
    assert [row["raw"]["t/x"] for row in read(cells.path)] == [0.1, 0.1, 0.25]
    assert read(cells.path)[1]["same_as"] == 0.1


def test_a_refusal_is_a_result_and_is_not_asked_for_again(tmp_path: Path) -> None:
    def refuse() -> dict[str, Any]:
        raise PlanError("no such plan")

    Cells(tmp_path / "cells.jsonl").keep(["m", "last", 0.5, 0], refuse)
    (row,) = read(tmp_path / "cells.jsonl")
    assert row["no_plan"] == "no such plan"
    Cells(tmp_path / "cells.jsonl").keep(["m", "last", 0.5, 0], lambda: pytest.fail("asked again"))


def test_every_method_has_a_speed_cell(all_jobs: Any) -> None:
    timed = {tuple(job.cell[2:]) for job in all_jobs("full") if job.cell[:2] == ["clip", "speed"]}
    for method in COMPARED.values():
        for fraction in method.fractions or PRESETS["full"].fractions:
            assert ((fraction,) if method.timed == "layers" else (fraction, method.timed)) in timed


def test_speed_only_asks_for_nothing_else(all_jobs: Any) -> None:
    assert {job.cell[1] for job in all_jobs("full", speed="only")} == {"dense", "speed"}
    assert "speed" not in {job.cell[1] for job in all_jobs("full", speed="no")}


def speed(factor: float) -> dict[str, dict[str, float]]:
    dense = {"prefill_seconds": 2.0, "decode_tokens_per_second": 10.0, "num_parameters": 100.0}
    pruned = {
        "prefill_seconds": 2.0 / factor**2,
        "decode_tokens_per_second": 10.0,
        "num_parameters": 7.0,
    }
    return {"pruned": pruned, "dense": dense}


def rows() -> list[dict[str, Any]]:
    return [
        {"cell": ["m", "dense"], "raw": {"t/x": 0.5, "t/y": 2.0}},
        {"cell": ["m", "speed", 0.25], "speed": speed(1.3)},
        {"cell": ["m", "speed", 0.25, "width"], "speed": speed(1.1)},
        {
            "cell": ["m", "last", 0.25, 0],
            "raw": {"t/x": 0.1, "t/y": 0.1},
            "healed": {"t/x": 0.5, "t/y": 1.0},
        },
        {
            "cell": ["m", "last", 0.25, 1],
            "raw": {"t/x": 0.1, "t/y": 0.1},
            "healed": {"t/x": 0.4, "t/y": 1.4},
        },
        {"cell": ["m", "width", 0.25, 0], "raw": {"t/x": 0.5, "t/y": 1.0}},
        {"cell": ["m", "uidl", 0.25, 0], "no_plan": "none"},
        {"cell": ["m", "sleb", 0.5, 0], "raw": {"t/x": 0.5, "t/y": 2.0}},
    ]


def test_differences_are_between_cells_of_one_seed() -> None:
    cells = [row for row in rows() if row["cell"][1] in ("dense", "last", "uidl")]
    healed = {"t/x": 0.45, "t/y": 1.6}
    for seed in (0, 1):
        cells.append({"cell": ["m", "sleb", 0.25, seed], "raw": {"t/x": 0.2, "t/y": 0.1}})
        cells.append({"cell": ["m", "kd", 0.25, seed], "healed": healed})
    shown = table(cells, "last").splitlines()
    assert "| `last` | 20.0 → 90.0 ± 10.0 | 5.0 → 60.0 ± 10.0 |" in shown
    assert "| `sleb` | +20.0 ± 0.0 | +0.0 ± 0.0 |" in shown
    # healed while it is made: 90 - 100 and 90 - 80 percent, 80 - 50 and 80 - 70
    assert "| `kd` | +0.0 ± 10.0 | +20.0 ± 10.0 |" in shown
    assert "| `uidl` | refused | refused |" in shown


def test_a_summary_is_the_mean_of_all_metrics_the_best_method_first() -> None:
    shown = summary(rows()).splitlines()
    assert shown[:2] == ["| | m, 25% | m, 50% |", "| --- | --- | --- |"]
    # last: healed 100 and 80 % of t/x, 50 and 70 % of t/y; it is the only one that was healed
    assert shown[2] == "| `last` | 12.5 → 75.0 ± 0.0 | - |"
    assert set(shown[3:]) == {
        "| `width` | 75.0 | - |",
        "| `uidl` | refused | - |",
        "| `sleb` | - | 100.0 |",
    }
    assert "50%" not in summary(rows(), [0.25])


def test_distances_are_thousandths_and_the_nearest_comes_first(tmp_path: Path) -> None:
    cells = [{"cell": ["m", "dense"], "raw": {"fidelity/kl": 0.0}}]
    for method, raw, healed in (("last", 5.25, 0.0181), ("width", 0.05, 0.00026)):
        for seed, factor in enumerate((1, 3)):
            found = ({"fidelity/kl": raw * factor}, {"fidelity/kl": healed * factor})
            cell = {"cell": ["m", method, 0.25, seed], "raw": found[0], "healed": found[1]}
            cells.append(cell)
    lines = ["| `last` | 10500 → 36.2 ± 18.1 |", "| `width` | 100 → 0.520 ± 0.260 |"]
    assert table(cells).splitlines()[3:] == lines
    assert summary(cells).splitlines()[2:] == lines[::-1]
    with pytest.raises(DataError, match="was both measured and timed"):
        plot(cells, tmp_path / "chart.png")


def test_distances_are_of_predictions_on_held_out_answers() -> None:
    bench = Bench(replace(PRESETS["divergence"].sizes, held_out=4), divergence=True)
    dense, other = (open_subject("blip-crowded") for _ in range(2))
    bench.model = lambda _: dense
    assert bench.dense("blip-crowded")["raw"] == {"fidelity/kl": 0.0}
    layers = other.towers["text"].layers
    layers[3].load_state_dict(layers[4].state_dict())
    collate = Collator(dense.processor, "caption")
    batch = collate(list(answers(SUBJECTS["blip-crowded"], dense, 4)))
    with torch.no_grad():
        own, its = (each.model(**batch).logits[:, :-1].log_softmax(-1) for each in (dense, other))
    counted = batch["labels"][:, 1:] != -100
    expected = (own.exp() * (own - its)).sum(-1)[counted].mean()
    assert bench._measure("blip-crowded", other) == {
        "fidelity/kl": pytest.approx(float(expected), rel=1e-4)
    }


def test_a_table_of_parameters_says_how_many_are_gone() -> None:
    dense = {"cell": ["m", "dense"], "raw": {"t/x": 0.5}, "parameters": 200}
    left = {"parameters": 200, "nonzero_parameters": 150}
    cells = [dense, {"cell": ["m", "magnitude", 0.3, 0], "raw": {"t/x": 0.4}, **left}]
    shown = table(cells, sizes=True)
    assert "| 30% of the parameters | m t/x |" in shown
    assert "| `magnitude` (25.0 % gone) | 80.0 |" in shown


def test_variants_share_a_process_and_exact_shares_are_not_rounded(all_jobs: Any) -> None:
    units = {job.unit for job in all_jobs("ablation", speed="no") if job.cell[:1] == ["clip"]}
    assert units == {("clip", "dense"), *((seed, "clip", "compensated") for seed in range(3))}
    assert PRESETS["ablation"].methods[0] == "compensated"
    jobs = all_jobs("parameters", speed="no")
    assert not any(job.same_as for job in jobs)
    assert {job.cell[2] for job in jobs if job.cell[1] == "width"} == {0.3, 0.4, 0.5}


def test_points_are_means_after_healing_beside_the_speed_of_their_kind() -> None:
    found = points(rows())
    assert set(found) == {("m", "`last`"), ("m", "`width`")}
    # (100 + 50 + 80 + 70) / 4
    assert found["m", "`last`"] == [pytest.approx((1.3, 75.0))]
    # before healing, where it was not healed
    assert found["m", "`width`"] == [pytest.approx((1.1, 75.0))]


def test_chart_is_a_small_png(tmp_path: Path) -> None:
    plot(rows(), tmp_path / "chart.png", ["last"])
    image = Image.open(tmp_path / "chart.png")
    assert image.format == "PNG"
    assert (tmp_path / "chart.png").stat().st_size < 30_000
    # the highlight's vermilion is there
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or ()}
    assert any(abs(r - 213) + abs(g - 94) + b < 30 for r, g, b in colours)


def test_chart_refuses_results_without_speed(tmp_path: Path) -> None:
    untimed = [row for row in rows() if row["cell"][1] != "speed"]
    with pytest.raises(DataError, match="--speed only"):
        plot(untimed, tmp_path / "chart.png")


def test_help_names_every_method_once_and_others_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    words = [word.strip(",.") for word in capsys.readouterr().out.split()]
    assert words.count("magnitude_per_matrix") == words.count("clip-2048") == 1
    for option, given, near in (
        ("--models", "clipp", "clip"),
        ("--methods", "slebb", "sleb"),
        ("--highlight", "slebb", "sleb"),
    ):
        with pytest.raises(SystemExit):
            parse([option, near, given])
        assert f"{option}: Unknown" in (told := capsys.readouterr().err)
        assert f"Did you mean '{near}'?" in told
    assert parse(["--methods", "sleb", "last"]).methods == ["sleb", "last"]
