"""JSON lines with what was measured, where and when; and the folder they lie in."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interlace._files import atomic_write_text
from interlace.records import Provenance

if TYPE_CHECKING:
    from interlace.microbenchmarks.measure import Bench, Record


def checkout() -> Path | None:
    """The checkout that this file lies in, or else the working folder if it is one."""
    places = (Path(__file__).resolve().parents[2], Path.cwd())
    return next((each for each in places if (each / "csrc" / "bindings.cpp").is_file()), None)


def today() -> str:
    """The date in UTC, as YYYY-MM-DD."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def device_name(device: torch.device) -> str:
    """The name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def results_folder(device: torch.device) -> Path:
    """A folder "cpu", or named after the GPU: of the checkout, or else of the working folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    root = checkout()
    return (root / "bench" / "results" if root else Path("interlace-bench")) / slug


def run_record(op_name: str, bench: Bench, arguments: dict[str, Any]) -> Record:
    """Describe a run: the first line of its file."""
    device = bench.setup.device
    provenance = Provenance.collect(seed=0)
    return {
        "kind": "run",
        "op": op_name,
        "date": today(),
        "device": device_name(device),
        "dtype": str(bench.setup.dtype).removeprefix("torch."),
        "versions": {
            "interlace-vlm": provenance.package_version,
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "python": platform.python_version(),
            "cuda": torch.version.cuda if device.type == "cuda" else None,
        },
        "commit": commit() or arguments.get("commit") or provenance.commit,
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(each, 2) for each in os.getloadavg()],
        "timing": {
            **bench.clock.describe(),
            **dataclasses.asdict(bench.effort),
            "order": "rounds over all contenders, every other one reversed",
            "backward": "torch.autograd.grad alone, with the graph of one forward pass kept",
        },
        "ceilings": dataclasses.asdict(bench.ceilings),
        "arguments": arguments,
    }


def refusal_record(op_name: str, violations: list[str]) -> Record:
    """Say why an op was not timed."""
    return {"kind": "refused", "op": op_name, "violations": violations}


def left_out_record(op_name: str, what: str, reason: str) -> Record:
    """Say what of an op was not timed, and why."""
    return {"kind": "left_out", "op": op_name, "what": what, "reason": reason}


def file_name(op_name: str, *, quick: bool) -> str:
    """Name of the file of an op; quick runs do not replace full ones of the same day."""
    return f"micro-{op_name}-{today()}{'-quick' if quick else ''}.jsonl"


def write_lines(path: Path, records: list[Record]) -> None:
    """Write all records, or leave the file as it was."""
    text = "".join(json.dumps(_rounded(record), allow_nan=False) + "\n" for record in records)
    atomic_write_text(path, text)


def read_lines(path: Path) -> list[Record]:
    """Read what `write_lines` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def commit() -> str:
    """The commit of this checkout, with "-dirty" behind it if files differ; empty without one."""
    root = checkout()
    if root is None:
        return ""
    try:
        found = subprocess.run(
            [
                "git",
                "-C",
                str(root),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    # platform knows the architecture only
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _rounded(value: Any) -> Any:
    # six digits say more than any clock knows
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
