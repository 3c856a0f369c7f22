from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from heal.runs import sharded, spread, uneven, whole
from heal.toys import run_child, start_child
from safetensors.torch import load_file

from interlace.records import HealReport

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def _compare(one: Path, other: Path) -> None:
    alone, together = (load_file(path.with_suffix(".safetensors")) for path in (one, other))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5, msg=name)
    reports = [HealReport.load(path.with_suffix(".json")) for path in (one, other)]
    assert reports[0].tokens == reports[1].tokens
    for left, right in zip(*(report.validation for report in reports), strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    for left, right in zip(*(report.losses for report in reports), strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _together(target: Callable[[Path], None], result: Path) -> None:
    """Run a function in two processes that know of each other what torchrun would tell them."""
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        # else accelerate warns on machines with one core
        "OMP_NUM_THREADS": "1",
    }
    ranks = ("0", "1")
    children = [start_child(target, result, **group, RANK=r, LOCAL_RANK=r) for r in ranks]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_child(spread, one) == 0
    _together(spread, two)
    _compare(one, two)
    # one process decides how far healing goes
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("two", "two-1"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_process_without_images_or_with_gates_trains_as_one_process_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_child(uneven, one) == 0
    _together(uneven, two)
    for towers in ("text-vision", "vision", "text"):
        _compare(tmp_path / f"one-{towers}", tmp_path / f"two-{towers}")
    gates = HealReport.load(tmp_path / "two-text.json").gates["text"]
    assert any(gate != 1.0 for layer in gates.values() for gate in layer.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use the GPU")
def test_sharded_gradients_equal_whole_ones(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    assert run_child(whole, one) == 0
    _together(sharded, two)
    for file in ("gradients.safetensors", "weights.safetensors", "half_way.safetensors"):
        left, right = load_file(one / file), load_file(two / file)
        assert left.keys() == right.keys()
        for name, value in left.items():
            torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert "gates.values" in load_file(one / "gradients.safetensors")


@pytest.mark.slow
def test_torchrun_equals_one_process_and_resumes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_child(spread, one) == 0
    _torchrun(two)
    _compare(one, two)
    # The last steps are done again from the checkpoint in the middle.
    first = load_file(two.with_suffix(".safetensors"))
    shutil.rmtree(two.with_suffix(".run") / "checkpoint-4")
    _torchrun(two)
    again = load_file(two.with_suffix(".safetensors"))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def _torchrun(result: Path) -> None:
    paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    settings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, "-m", *launch, str(HERE / "runs.py"), str(result)]
    done = subprocess.run(command, env=settings, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
