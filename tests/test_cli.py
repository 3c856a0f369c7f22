"""The command line as a user meets it: the words, the files, the exit codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import typer
from PIL import Image

from interlace.cli import app

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = (
    "score", "plan", "prune", "heal", "eval", "export", "run", "progressive", "demo", "bench",
    "ops", "doctor",
)  # fmt: skip


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scores file of the bundled Qwen3-VL."""
    import interlace as il

    path = tmp_path_factory.mktemp("scores") / "scores.json"
    vlm = il.open_model("bundled:qwen3-vl", dtype="float32")
    calibration = il.samples("scenes", count=8, processor=vlm.processor)
    il.score(vlm, calibration, packs="all", towers=("text",)).save(path)
    return path


def test_help_names_every_command(interlace) -> None:
    code, out, _ = interlace("--help")
    assert code == 0
    for command in COMMANDS:
        assert f" {command} " in out
        sub_code, sub_out, _ = interlace(command, "--help")
        assert sub_code == 0
        assert "usage" in sub_out.lower()


def test_every_option_says_what_it_is_for() -> None:
    commands = typer.main.get_command(app).commands
    assert commands.keys() == set(COMMANDS)
    silent = [
        (name, option.name)
        for name, command in commands.items()
        for option in command.params
        if not option.help
    ]
    assert not silent


def test_the_steps_one_by_one(interlace, tmp_path: Path) -> None:
    scores, plan, student = (tmp_path / name for name in ("s.json", "p.json", "student"))
    heatmap, picture = tmp_path / "heat.png", tmp_path / "plan.png"
    step = interlace(
        "score", "bundled:qwen3-vl", "-o", scores, "--count", 8, "--tower", "text",
        "--heatmap", heatmap,
    )  # fmt: skip
    assert step[0] == 0, step
    step = interlace("plan", scores, "-o", plan, "--drop-fraction", 0.25, "--picture", picture)
    assert step[0] == 0, step
    assert "drop" in step[1]
    assert heatmap.read_bytes().startswith(b"\x89PNG")
    assert picture.read_bytes().startswith(b"\x89PNG")
    step = interlace("prune", "bundled:qwen3-vl", plan, "-o", student)
    assert step[0] == 0, step
    assert (
        json.loads((student / "config.json").read_text())["text_config"]["num_hidden_layers"] == 12
    )
    report = tmp_path / "eval.json"
    step = interlace(
        "eval", student, "--baseline", "bundled:qwen3-vl", "--task", "fidelity,vqa",
        "--count", 16, "-o", report,
    )  # fmt: skip
    assert step[0] == 0, step
    assert "retention" in step[1]
    copy = tmp_path / "copy"
    step = interlace("export", student, copy, "--record", plan, "--record", report)
    assert step[0] == 0, step
    assert (copy / "README.md").exists()


def test_a_fused_model_is_measured(interlace, tmp_path: Path) -> None:
    report = tmp_path / "eval.json"
    step = interlace(
        "eval", "bundled:clip", "--task", "retrieval", "--count", 8, "--fuse", "-o", report,
    )  # fmt: skip
    assert step[0] == 0, step
    assert json.loads(report.read_text())["details"]["fused"][0].startswith("CLIPModel on cpu")


def test_several_metrics_choose_together(interlace, tmp_path: Path) -> None:
    scores, plan = tmp_path / "s.json", tmp_path / "p.json"
    step = interlace(
        "score", "bundled:clip", "-o", scores, "--count", 8, "--metrics",
        "similarity,alignment,sensitivity,relevance",
    )  # fmt: skip
    assert step[0] == 0, step
    found = json.loads(scores.read_text())["towers"]["vision"]
    assert set(found["metrics"]) == {"alignment", "sensitivity", "relevance"}
    assert found["alignment"].keys() == {"11"}
    step = interlace(
        "plan", scores, "-o", plan, "--weights", "similarity=1,relevance=2", "--protect",
        "alignment", "--group", "balanced", "--tower", "vision", "--num-drop", 2,
    )  # fmt: skip
    assert step[0] == 0, step
    settings = json.loads(plan.read_text())["settings"]
    assert settings["weights"] == {"similarity": 1.0, "relevance": 2.0}
    assert (settings["protect"], settings["group"]) == ("alignment", "balanced")
    assert "its output enters the projection into the shared space" in step[1]
    assert "weighted" in step[1]


def test_heal_writes_a_student_and_can_be_resumed(interlace, scores: Path, tmp_path: Path) -> None:
    plan, healed = tmp_path / "plan.json", tmp_path / "healed"
    assert interlace("plan", scores, "-o", plan)[0] == 0
    options = (
        "--count", 32, "--max-steps", 2, "--batch-size", 4, "--learning-rate", 1e-4,
        "--validation-fraction", 0.125,
    )  # fmt: skip
    first = interlace("heal", "bundled:qwen3-vl", plan, "-o", healed, *options)
    assert first[0] == 0, first
    assert "% of the way kept" in first[1]
    assert (healed / "model.safetensors").exists()
    again = interlace("heal", "bundled:qwen3-vl", plan, "-o", healed, *options)
    assert again[0] == 2
    assert "exists" in again[2]
    resumed = interlace(
        "heal", "bundled:qwen3-vl", plan, "-o", healed, *options, "--resume", "--overwrite"
    )
    assert resumed[0] == 0, resumed


def test_progressive_says_where_a_stage_was_rolled_back(interlace, tmp_path: Path) -> None:
    code, _, told = interlace(
        "progressive", "bundled:clip", "-o", tmp_path / "out", "--tower", "text",
        "--rule", "random", "--drop-fraction", 0.5, "--stages", 1, "--min-retention", 1,
        "--calibration-count", 8, "--heal-count", 8, "--batch-size", 4, "--count", 8,
        "--task", "retrieval",
    )  # fmt: skip
    assert code == 2
    assert "Stage 1 of 1 was rolled back" in told
    assert "no student to hand over" in told
    assert (tmp_path / "out" / "progressive" / "stage-1" / "student").is_dir()
    assert not (tmp_path / "out" / "model").exists()


GATED = ("--gates", "l1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", "SCORES", "-o", "OUT", "--rule", "interlac"), "Did you mean 'interlace'"),
        (("plan", "SCORES", "-o", "OUT", "--drop-fraction", "1.5"), "1.5"),
        (("plan", "SCORES", "-o", "OUT", "--drop-fraction", "0.99"), "layers"),
        (("plan", "SCORES", "-o", "OUT", "--protect", "0,x"), "whole numbers"),
        (("plan", "missing.json", "-o", "OUT"), "missing.json"),
        (("score", "bundled:qwen", "-o", "OUT"), "Did you mean 'qwen3-vl'"),
        (("score", "./no-such-folder", "-o", "OUT"), "no-such-folder"),
        (("score", "bundled:clip", "-o", "OUT", "--metrics", "similarty"), "similarity"),
        (("plan", "SCORES", "-o", "OUT", "--weights", "similarity"), "every metric once"),
        (("plan", "SCORES", "-o", "OUT", "--weights", "a=1,a=2"), "every metric once"),
        (("plan", "SCORES", "-o", "OUT", "--weights", "relevanse=1"), "Unknown metric"),
        (("plan", "SCORES", "-o", "OUT", "--heads", "text:0.5"), "--heads is 'text:0.5'"),
        (("plan", "SCORES", "-o", "OUT", "--ffn", "a=1,a=2"), "every tower once"),
        (("plan", "SCORES", "-o", "OUT", "--ffn", "0.5", "--spread", "globl"), "global"),
        (("plan", "SCORES", "-o", "OUT", "--heads", "0.5"), "head_norm"),
        (("plan", "SCORES", "-o", "OUT", "--width-metrics", "heads"), "heads or ffn once"),
        (("score", "bundled:clip", "-o", "OUT", "--packs", "1,99", "--count", "2"), "99"),
        (("eval", "bundled:clip", "--task", "vqa", "--count", "4"), "vqa"),
        (("eval", "bundled:clip", "--task", "retrival"), "Did you mean 'retrieval'"),
        (("score", "bundled:clip", "-o", "OUT", "--data", "none.json"), "none.json"),
        (("run", "none.toml"), "none.toml"),
        (("progressive", "bundled:clip", "-o", "OUT", "--rule", "slebb"), "Did you mean 'sleb'"),
        (("progressive", "bundled:clip", "-o", "OUT", "--guard", "lost"), "Give 'loss'"),
        (("progressive", "bundled:clip", "-o", "OUT", "--gates", "l2"), "Did you mean 'l1'"),
        (("progressive", "bundled:clip", "-o", "OUT", "--gate-units", "heds"), "mean 'heads'"),
        # gates switch the share that validates off, unless it is asked for
        (("progressive", "bundled:clip", "-o", "OUT", *GATED, "--rule", "slebb"), "mean 'sleb'"),
        (
            ("progressive", "bundled:clip", "-o", "OUT", *GATED, "--validation-fraction", "0.1"),
            "neither open nor closed",
        ),
        (("plan", "SCORES", "-o", "OUT", "--protect", "autoo"), "give auto, alignment, none"),
        (("plan", "SCORES", "-o", "OUT", "--rule", "sleb"), "asks the model for its loss"),
        (("eval", "bundled:clip", "--task", "retrieval", "--split", "tset"), "split of scenes"),
        (("prune", "MODEL", "PLAN", "-o", "OUT", "--bridges", "fodl"), "Did you mean 'fold'"),
        (("heal", "MODEL", "PLAN", "-o", "OUT", "--bridges", "text=fodl"), "Did you mean 'fold'"),
        (("prune", "MODEL", "PLAN", "-o", "OUT", "--bridges", "text=fold,text=none"), "once"),
        (("prune", "MODEL", "PLAN", "-o", "OUT", "--token-weights", "fisher"), "nothing is fitted"),
        (
            ("heal", "MODEL", "PLAN", "-o", "OUT", "--bridges", "fold", "--rank", 4),
            "only 'lowrank'",
        ),
        (
            ("heal", "MODEL", "PLAN", "-o", "OUT", "--bridges", "fold", "--token-weights", "evn"),
            "Did you mean 'even'",
        ),
        (("plan", "SCORES", "-o", "OUT", "--protect", ","), "or whole numbers"),
    ],
)
def test_bad_input_ends_with_code_2_and_says_why(
    interlace, scores: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    out = tmp_path / "out.json"
    filled = [{"SCORES": str(scores), "OUT": str(out)}.get(part, part) for part in arguments]
    code, _, err = interlace(*filled)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("score", "MODEL", "-o", "FILE/s.json"), "Cannot create"),
        (("score", "MODEL", "-o", "FOLDER", "--overwrite"), "is a folder"),
        (("score", "MODEL", "-o", "NEW", "--heatmap", "FILE"), "exists already"),
        (("score", "MODEL", "-o", "NEW", "--heatmap", "NEW.bmp"), "figure format 'bmp'"),
        (("score", "MODEL", "-o", "NEW.png", "--heatmap", "NEW.png"), "Name two"),
        (("score", "MODEL", "-o", "NEW", "--packs", "1,x"), "whole numbers"),
        (("score", "MODEL", "-o", "NEW", "--packs", ","), "whole numbers"),
        (("score", "MODEL", "-o", "NEW", "--metrics", "similarty"), "Did you mean 'similarity'"),
        (
            ("score", "MODEL", "-o", "NEW", "--heatmap", "NEW.png", "--metrics", "relevance"),
            "--heatmap draws the similarity",
        ),
        (("score", "MODEL", "-o", "NEW", "--root", "there"), "root is 'there'"),
        (("eval", "MODEL", "--root", "there"), "root is 'there'"),
        (("heal", "MODEL", "FILE", "-o", "NEW", "--root", "there"), "root is 'there'"),
        (("prune", "MODEL", "FILE", "-o", "NEW", "--bridges", "fold", "--root", "x"), "root is"),
        (("prune", "MODEL", "FILE", "-o", "NEW", "--data", "x.json"), "only to fit bridges"),
        (("progressive", "MODEL", "-o", "NEW", "--root", "there"), "root is 'there'"),
        (("plan", "FILE", "-o", "FILE"), "exists already"),
        (("plan", "FILE", "-o", "NEW", "--picture", "FILE/p.png"), "Cannot create"),
        (("prune", "MODEL", "FILE", "-o", "FILE/student"), "Cannot create"),
        (("heal", "MODEL", "FILE", "-o", "FILE/student"), "Cannot create"),
        (("eval", "MODEL", "-o", "FILE/e.json"), "Cannot create"),
        (("eval", "MODEL", "-o", "FOLDER", "--overwrite"), "is a folder"),
        (("export", "MODEL", "FOLDER"), "exists already"),
        (("demo", "-o", "FILE"), "Cannot create"),
        (("run", "RECIPE", "-o", "FILE/run"), "Cannot create"),
    ],
)
def test_arguments_are_refused_before_a_model_is_opened(
    interlace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    places = {name: tmp_path / name.lower() for name in ("FILE", "FOLDER", "NEW", "RECIPE")}
    places["FILE"].write_text("mine")
    places["FOLDER"].mkdir()
    places["RECIPE"].write_text('[model]\npath = "bundled:clip"\n')
    before = sorted(tmp_path.rglob("*"))

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened first")

    for module in (
        "interlace.cli.open_vlm",
        "interlace._cli_students.open_vlm",
        "interlace.demo.open_model",
    ):
        monkeypatch.setattr(module, opened)
    monkeypatch.setattr("interlace.pipeline.open_model", opened)
    filled = []
    for part in arguments:
        name = next((name for name in places if part.startswith(name)), "")
        filled.append(f"{places[name]}{part.removeprefix(name)}" if name else part)
    code, _, err = interlace(*filled)
    assert code == 2
    assert says in err
    assert sorted(tmp_path.rglob("*")) == before
    assert places["FILE"].read_text() == "mine"


def test_the_split_that_is_asked_for_is_measured(interlace, tmp_path: Path) -> None:
    found = {}
    for split in ("train", "test"):
        path = tmp_path / f"{split}.json"
        task = ("--task", "retrieval", "--count", 8, "--split", split)
        assert interlace("eval", "bundled:clip", *task, "-o", path)[0] == 0
        found[split] = json.loads(path.read_text())
    assert found["train"]["inputs"] != found["test"]["inputs"]
    assert found["train"]["details"]["settings"]["data"] == "train scenes, 8 per task, seed 0"


def test_data_options_reach_the_data(interlace, tmp_path: Path) -> None:
    import datasets

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "empty.png").touch()
    names = ["red.png", "red.png", "red.png", "empty.png"]
    rows = [{"image": name, "caption": f"caption {i}"} for i, name in enumerate(names)]
    listing = tmp_path / "rows.json"
    listing.write_text(json.dumps(rows))
    call = ("score", "bundled:clip", "-o", tmp_path / "s.json", "--overwrite", "--data")
    code, _, err = interlace(*call, listing)
    assert code == 2
    assert "empty.png: empty (0 bytes)" in err
    assert interlace(*call, listing, "--max-bad-fraction", 0.5)[0] == 0
    scored = json.loads((tmp_path / "s.json").read_text())
    assert scored["towers"]["text"]["num_samples"] == 3

    parts = {"train": datasets.Dataset.from_list(rows[:2]), "val": datasets.Dataset.from_list(rows)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    (tmp_path / "red.png").rename(tmp_path / "saved" / "red.png")
    assert interlace(*call, tmp_path / "saved")[0] == 0
    code, _, err = interlace(*call, tmp_path / "saved", "--split", "val")
    assert code == 2
    assert "empty.png" in err
    code, _, err = interlace(*call, tmp_path / "saved", "--split", "test")
    assert code == 2
    assert "It has train, val" in err


def test_altered_scores_are_refused(interlace, scores: Path, tmp_path: Path) -> None:
    altered = tmp_path / "scores.json"
    data = json.loads(scores.read_text())
    data["towers"]["text"]["similarity"]["all"]["1"][3] = 0.123
    altered.write_text(json.dumps(data))
    code, _, err = interlace("plan", altered, "-o", tmp_path / "plan.json")
    assert code == 2
    assert "altered" in err


def test_a_plan_of_another_model_is_refused(interlace, scores: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert interlace("plan", scores, "-o", plan)[0] == 0
    code, _, err = interlace("prune", "bundled:blip", plan, "-o", tmp_path / "student")
    assert code == 2
    assert "model" in err
    assert not (tmp_path / "student").exists()


def test_bridges_are_fitted_where_they_are_asked_for(
    interlace, scores: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert interlace("plan", scores, "-o", plan, "--num-drop", 1)[0] == 0
    call = ("prune", "bundled:qwen3-vl", plan, "--count", 8, "-o")
    lowrank = ("text=lowrank,vision=none", "--rank", 4)
    for name, options in (("fold", ("fold",)), ("lowrank", lowrank)):
        step = interlace(*call, tmp_path / name, "--bridges", *options)
        assert step[0] == 0, step
        manifest = json.loads((tmp_path / name / "interlace.json").read_text())
        assert [bridge["kind"] for bridge in manifest["bridges"]] == [name]
        assert manifest["standard"] == (name == "fold")
    assert manifest["bridges"][0]["settings"]["rank"] == 4
    code, _, err = interlace(*call, tmp_path / "out", "--data", tmp_path)
    assert code == 2
    code, _, err = interlace(*call, tmp_path / "out", "--bridges", "vision=fold")
    assert code == 2
    assert "loses nothing by this plan" in err
    assert not (tmp_path / "out").exists()
    options = ("--count", 8, "--max-steps", 1, "--batch-size", 4, "--bridges", "scale")
    options += ("--token-weights", "fisher")
    step = interlace("heal", "bundled:qwen3-vl", plan, "-o", tmp_path / "healed", *options)
    assert step[0] == 0, step
    manifest = json.loads((tmp_path / "healed" / "interlace.json").read_text())
    assert [bridge["kind"] for bridge in manifest["bridges"]] == ["scale"]
    assert manifest["bridges"][0]["settings"]["token_weights"] == "fisher"


def test_ops_and_doctor_speak_within_the_terminal(
    interlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interlace import ops

    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = interlace("ops")
    assert code == 0
    for op, backend, reason in ops.table():
        line = next(line for line in out.splitlines() if line.split()[:2] == [op, backend])
        assert line.split()[2:5] == (reason or "runs").split()[:3]
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = interlace("doctor")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    # wrapped, but nothing is lost
    assert " ".join(" ".join(ops.doctor().values()).split()) == " ".join(
        line[out.index("on this machine") :].strip() for line in out.splitlines()[2:]
    )
