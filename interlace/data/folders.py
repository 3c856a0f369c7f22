"""A folder of images with captions: one captions file, or a text file next to every image."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from interlace.data.conversations import RecordList, open_annotations
from interlace.data.images import SUFFIXES
from interlace.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.data.samples import RecordReader

logger = logging.getLogger(__name__)

_CAPTION_FILES = ("captions.jsonl", "captions.json", "metadata.jsonl")


def open_folder(folder: Path, root: Path | None = None) -> RecordReader:
    """Open an image folder.

    Captions come from `captions.jsonl`, `captions.json` (records, captions by file name, or COCO
    captions), `metadata.jsonl`, a single `captions_*.json`, or a `.txt` file next to each image
    with one caption per line.

    Args:
        folder: The folder.
        root: Folder that the image paths of a captions file start from; `folder` if not given.

    Raises:
        DataError: No captions, more than one captions file, or an unreadable one.
    """
    base = folder if root is None else root
    found = [folder / name for name in _CAPTION_FILES if (folder / name).is_file()]
    found = found or sorted(folder.glob("captions_*.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: more than one captions file ({names}). Give the file itself.")
    if found:
        return open_annotations(found[0], base)
    return _with_text_files(folder)


def _with_text_files(folder: Path) -> RecordReader:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    records = []
    for image in images:
        captions = _captions(image.with_suffix(".txt"))
        if captions:
            name = image.relative_to(folder).as_posix()
            records.append({"id": name, "image": name, "captions": captions})
    if not records:
        raise DataError(
            f"{folder}: {len(images)} images, but no captions. Add captions.jsonl with lines like "
            '{"image": "a.jpg", "caption": "..."}, or a .txt file next to each image; for '
            "conversations give the .json or .jsonl file itself."
        )
    if len(records) < len(images):
        logger.warning("%s: %d images have no caption", folder, len(images) - len(records))
    return RecordList(records, name=str(folder), stem=folder.name, root=folder)


def _captions(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the captions cannot be read: {error}. Save as UTF-8.") from error
    return [line.strip() for line in lines if line.strip()]
