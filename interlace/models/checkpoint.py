"""Looking at a checkpoint folder before anything is loaded, so that faults are told in words.

Weights are read from safetensors files only: other formats are pickles, which run code when they
are opened.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from interlace.errors import CheckpointError
from interlace.records import PruneRecord

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "interlace.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# A header is a few hundred bytes per tensor; more than this is not a header.
_MAX_HEADER_BYTES = 100 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, empty or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; a checkpoint folder needs it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is whole: a header, and as many bytes as the header says.

    Raises:
        CheckpointError: the file is missing, empty, truncated or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, but the checkpoint refers to it.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is no whole safetensors file ({size} bytes). It was cut off or is of "
                "another format; copy or download it again."
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: the safetensors header is damaged: {error}.") from error
    ends = [
        entry["data_offsets"][1]
        for name, entry in header.items()
        if name != "__metadata__" and isinstance(entry, dict) and "data_offsets" in entry
    ]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"{path} has {size} bytes, its header says {expected}. It was cut off or altered; copy "
            "or download it again."
        )


def check_folder(folder: Path) -> None:
    """Check that a folder is a checkpoint whose weights are whole safetensors files.

    Raises:
        CheckpointError: in words, what is missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected a checkpoint folder.")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty, expected config.json and model.safetensors.")
    read_json(folder / "config.json")
    if (folder / _INDEX).is_file():
        shards = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{folder / _INDEX} names no weights ('weight_map').")
        for name in sorted(set(map(str, shards.values()))):
            if "/" in name or "\\" in name:
                raise CheckpointError(f"{folder / _INDEX} names a file outside its folder: {name}.")
            check_safetensors(folder / name)
        return
    if (folder / _SINGLE).is_file():
        check_safetensors(folder / _SINGLE)
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} holds its weights as {', '.join(pickled[:3])}, which are pickles and may "
            "run code when opened. Only safetensors are read; convert them with `save_pretrained` "
            "on a machine you trust."
        )
    raise CheckpointError(f"{folder} has no weights, expected {_SINGLE} or {_INDEX}.")


def read_manifest(folder: Path) -> PruneRecord | None:
    """Read how a checkpoint was pruned, or None where it holds no manifest.

    Raises:
        CheckpointError: the manifest is damaged or was altered.
    """
    path = folder / MANIFEST
    return PruneRecord.load(path) if path.is_file() else None
