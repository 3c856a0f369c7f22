"""The command line as torchrun starts it: several processes, one output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from interlace.errors import InterlaceError
from interlace.records import Scores


def _torchrun(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a script or `-m MODULE ...` in two processes of one thread each, without a GPU."""
    root = str(Path(__file__).parent.parent)
    settings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [sys.executable, *launch, *map(str, command)]
    return subprocess.run(line, env=settings, check=False, capture_output=True, text=True)


JOINING = """
import time
from pathlib import Path
import torch
from interlace._torch_utils import joined_processes, sum_over_processes
for number in range(3):
    with joined_processes() as (rank, world):
        total = sum_over_processes(torch.tensor([rank + 1.0]))
        assert (world, total.item()) == (2, 3.0)
    # one process comes later than the other
    time.sleep(rank)
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads
"""


def test_processes_join_and_part_several_times(tmp_path: Path) -> None:
    script = tmp_path / "joining.py"
    script.write_text(JOINING)
    done = _torchrun(script)
    assert done.returncode == 0, done.stderr


def test_two_processes_write_one_output(interlace, tmp_path: Path) -> None:
    one, two, plan, healed = (tmp_path / name for name in ("1.json", "2.json", "plan", "healed"))
    measure = ("score", "bundled:clip", "--count", 8, "--tower", "text", "--heatmap")
    assert interlace(*measure, tmp_path / "1.png", "-o", one)[0] == 0
    scored = _torchrun("-m", "interlace", *measure, tmp_path / "2.png", "-o", two)
    assert scored.returncode == 0, scored.stderr
    assert scored.stdout == f"Wrote {two}\nWrote {tmp_path / '2.png'}\n"
    for group, tables in Scores.load(one)["text"].similarity.items():
        for pack, values in tables.items():
            assert Scores.load(two)["text"].packs(pack, group) == pytest.approx(values, abs=1e-6)

    assert interlace("plan", two, "-o", plan)[0] == 0
    options = ("--count", 16, "--batch-size", 2, "--max-steps", 2, "--validation-fraction", 0.25)
    done = _torchrun("-m", "interlace", "heal", "bundled:clip", plan, "-o", healed, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Wrote {healed} after 2 steps")
    assert done.stdout.count("\n") == 1
    assert json.loads((healed / "heal.json").read_text())["settings"]["batch_size"] == 2
    assert (healed / "model.safetensors").exists()
    # nothing half-written beside it
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"1.json", "1.png", "2.json", "2.png", "plan", "healed", "healed.healing"}


def test_what_only_one_process_can_do_is_refused_in_several(
    interlace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (
        ("plan", tmp_path / "scores.json", "-o", tmp_path / "plan.json"),
        ("run", tmp_path / "recipe.toml"),
        ("progressive", "bundled:clip", "-o", tmp_path / "run"),
    ):
        code, _, error = interlace(*command)
        assert code == 2
        assert f"interlace {command[0]} runs in one process" in error
        assert "without torchrun" in error


class _OpenedError(InterlaceError):
    """Says where a model was to be opened, instead of doing it."""


@pytest.mark.parametrize(("rank", "place"), [(None, "cuda"), ("1", "cuda:1"), ("3", "cuda:1")])
def test_a_model_is_opened_on_the_gpu_of_its_process(
    interlace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str | None, place: str
) -> None:
    def opened(*_: object, device: str, **__: object) -> None:
        raise _OpenedError(f"on {device}")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    # two of them, of four processes
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    # first where it is imported to: the import must find the true one
    monkeypatch.setattr("interlace.pipeline.open_model", opened)
    monkeypatch.setattr("interlace.models.open_model", opened)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    for command in (
        ("score", "bundled:clip", "-o", tmp_path / "scores.json"),
        ("progressive", "bundled:clip", "-o", tmp_path / "run"),
    ):
        assert interlace(*command)[2] == f"Error: on {place}\n"
        assert interlace(*command, "--device", "cpu")[2] == "Error: on cpu\n"
