"""Checkpoints of a healing run: whole or not there, verified before use, and free of pickles.

A checkpoint is a folder `checkpoint-<step>`:

    weights.safetensors      the trained parameters, whole, by their names in the student
    optimizer.safetensors    the optimizer's tensors, "<state>/<parameter name>"
    rng-<process>.json       states of the random number generators of each process
    trainer_state.json       the Trainer's own state: step, loss history
    heal.json                what the run is, where it stands, and the SHA-256 of every other file

It is written under another name, synced to disk and renamed, so a process killed half-way leaves no
folder that looks like a checkpoint. Frozen weights are not in it: the student brings them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from interlace._files import disk_full_message, is_disk_full, sha256_of_file, sync, sync_folder
from interlace.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

logger = logging.getLogger(__name__)

SCHEMA = 1
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
MANIFEST = "heal.json"
# beside the checkpoints: what the run started from
START = "start.safetensors"
# ends what is not complete
PART = ".part"

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        step: optimiser steps taken.
        identity: fingerprints of everything that must be the same for a run to be continued.
        progress: running sums of the run: "seconds", "tokens", "num_samples".
        scheduler: state of the learning-rate schedule.
    """

    step: int
    identity: dict[str, Any]
    progress: dict[str, float]
    scheduler: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after a step."""
    return f"checkpoint-{step}"


def part_of(output: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written before it is complete."""
    return output / f".{checkpoint_name(step)}{PART}"


def begin(output: Path, step: int) -> None:
    """Make the empty folder that a checkpoint is written to."""
    part = part_of(output, step)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def complete(output: Path, step: int, manifest: Manifest) -> Path:
    """Seal what was written: hash every file, write the manifest, sync, rename."""
    part, target = part_of(output, step), output / checkpoint_name(step)
    files = {path.name: sha256_of_file(path) for path in sorted(part.iterdir())}
    content = {"schema": SCHEMA, **vars(manifest), "files": files}
    (part / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for path in part.iterdir():
        sync(path)
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)
    sync_folder(output)
    return target


@contextlib.contextmanager
def worded_errors(output: Path, step: int) -> Iterator[None]:
    """Turn errors of writing a checkpoint into CheckpointError, and leave no part of it behind."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part_of(output, step), ignore_errors=True)
        if is_disk_full(error):
            raise CheckpointError(disk_full_message(output)) from error
        raise CheckpointError(
            f"Cannot write a checkpoint to {output} ({error}). Check the path and its permissions; "
            "the last complete checkpoint is unharmed."
        ) from error


def rotate(output: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and unfinished ones."""
    for path in _checkpoints(output)[keep:]:
        # Renamed first, so that a kill half-way leaves no checkpoint with files missing.
        gone = path.with_name(f".{path.name}{PART}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    for path in output.glob(f".checkpoint-*{PART}"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(output: Path) -> list[Path]:
    if not output.is_dir():
        return []
    found = [path for path in output.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: -_step_of(path))


def foreign(output: Path) -> list[str]:
    """Return the names of what lies in a folder of checkpoints and is none of healing's."""

    def is_own(name: str) -> bool:
        if name.startswith(".") and name.endswith(PART):
            name = name[1 : -len(PART)]
        return name == START or _NAME.fullmatch(name) is not None

    return sorted(path.name for path in output.iterdir() if not is_own(path.name))


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def read(path: Path) -> Manifest:
    """Verify a checkpoint and return its manifest.

    Raises:
        CheckpointError: a file is missing, damaged, altered, or of another schema.
    """
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise CheckpointError(
                f"{path} has schema version {content['schema']!r}; this version of the package "
                f"reads {SCHEMA} only. Resume with the version that wrote it, or start anew."
            )
        manifest = Manifest(
            int(content["step"]), content["identity"], content["progress"], content["scheduler"]
        )
        for name, expected in content["files"].items():
            if sha256_of_file(path / name) != expected:
                raise CheckpointError(f"{path / name} does not match its checksum: it was damaged.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint ({error}).") from error
    return manifest


def newest(output: Path) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that passes its verification, None where there is none.

    Damaged ones are passed over with a warning.
    """
    for path in _checkpoints(output):
        try:
            return path, read(path)
        except CheckpointError as error:
            logger.warning("Passed over: %s", error)
    return None


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to continue another run.

    Raises:
        CheckpointError: names what differs.
    """
    apart = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if not apart:
        return
    lines = []
    for key in apart:
        before, now = found.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            names = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
            lines += [f"{key}.{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in names]
        else:
            lines.append(f"{key}: {_short(before)} then, {_short(now)} now")
    raise CheckpointError(
        f"{path} belongs to another run, so it cannot be resumed: {'; '.join(lines)}. "
        "Resume with what the run was started with, or choose another output folder."
    )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else text


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file."""
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read {path} ({error}).") from error


def rng_state() -> dict[str, Any]:
    """Return the states of all random number generators of this process as JSON-able values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.random.get_rng_state().numpy().tobytes().hex(),
    }
    started: Any = torch.cuda.is_initialized
    if started():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned, also after a trip through JSON."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
