"""Annotation files: JSON and JSON Lines of any known schema, and COCO captions.

A JSON Lines file stays on disk: one pass checks every line and keeps where it starts, and a record
is parsed when it is wanted.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interlace.data.images import to_image
from interlace.data.schemas import sample_from_record
from interlace.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.data.images import ImageSource
    from interlace.data.samples import RecordReader, Sample


class RecordList:
    """Records in memory, such as those of a JSON file."""

    def __init__(self, records: Sequence[Any], *, name: str, stem: str, root: Path | None) -> None:
        """Hold `records`; relative image paths start from `root`, which none may leave."""
        self.name = name
        self._records = records
        self._stem = stem
        self._root = root

    def __len__(self) -> int:
        """Give the number of records."""
        return len(self._records)

    def read(self, index: int) -> Sample:
        """Parse record `index`."""
        return self._parse(self._records[index], index, f"{self.name}, record {index}")

    def _parse(self, record: Any, index: int, where: str) -> Sample:
        def make(value: Any, column: str | None, position: int) -> ImageSource:
            return to_image(value, root=self._root, where=where)

        return sample_from_record(
            record, where=where, default_id=f"{self._stem}-{index}", make_image=make
        )


class LineRecords(RecordList):
    """Records of a JSON Lines file, read one at a time."""

    def __init__(self, path: Path, *, root: Path) -> None:
        """Check every line of `path` and remember where each record starts."""
        super().__init__((), name=str(path), stem=path.stem, root=root)
        self._path = path
        self._starts = array("Q")
        self._lines = array("Q")
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    _parse_json(line.rstrip(), str(path), first_line=number)
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)

    def __len__(self) -> int:
        """Give the number of records."""
        return len(self._starts)

    def read(self, index: int) -> Sample:
        """Read and parse record `index`."""
        number = self._lines[index]
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            record = _parse_json(file.readline().rstrip(), self.name, first_line=number)
        return self._parse(record, index, f"{self.name}, line {number}")


def open_annotations(path: Path, root: Path | None = None) -> RecordReader:
    """Open a .json or .jsonl file.

    Args:
        path: The file: a list of records, one record per line, or COCO captions.
        root: Folder of the images; the folder of the file if not given.

    Raises:
        DataError: Unreadable, empty, not JSON (with the line), or of an unknown layout.
    """
    folder = path.parent if root is None else root
    try:
        if path.suffix.lower() == ".jsonl":
            reader: RecordList = LineRecords(path, root=folder)
        else:
            reader = _open_json(path, folder)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not len(reader):
        raise DataError(f"{path}: holds no records; give a file with at least one.")
    return reader


def _open_json(path: Path, root: Path) -> RecordList:
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"{path}: is empty; expected a JSON list of records.")
    try:
        content = _parse_json(data, str(path))
    except DataError as error:
        cause = error.__cause__
        # JSON Lines under the name .json are common.
        if isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data":
            return LineRecords(path, root=root)
        raise
    if isinstance(content, Mapping):
        content = _records_of_object(content, path)
    if not isinstance(content, list):
        raise DataError(f"{path}: holds a {type(content).__name__}; expected a list of records.")
    return RecordList(content, name=str(path), stem=path.stem, root=root)


def _records_of_object(content: Mapping[str, Any], path: Path) -> list[Any]:
    """COCO captions, or captions by file name, as a list of caption records."""
    images, annotations = content.get("images"), content.get("annotations")
    if isinstance(images, list) and isinstance(annotations, list):
        return _coco(images, annotations, path)
    plain = all(isinstance(value, str | list) for value in content.values())
    if plain and content and all("." in key for key in content):
        return [{"id": key, "image": key, "captions": value} for key, value in content.items()]
    if {"conversations", "messages", "texts", "image"} & content.keys():
        return [content]
    raise DataError(
        f"{path}: an object with the keys {', '.join(list(content)[:8]) or 'none'}; expected a "
        "list of records, COCO captions (images, annotations), or captions by file name."
    )


def _coco(images: list[Any], annotations: list[Any], path: Path) -> list[Any]:
    captions: dict[Any, list[str]] = {}
    try:
        for number, annotation in enumerate(annotations):
            where = f"{path}, annotations[{number}]"
            captions.setdefault(annotation["image_id"], []).append(str(annotation["caption"]))
        records = []
        for number, image in enumerate(images):
            where = f"{path}, images[{number}]"
            found = captions.get(image["id"])
            if found:
                records.append({"id": image["id"], "image": image["file_name"], "captions": found})
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where}: misses {error}; COCO captions need image_id and caption, and for every "
            "image id and file_name."
        ) from error
    return records


def _parse_json(data: bytes, name: str, first_line: int = 1) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{name}, line {line}, column {error.colno}: not valid JSON ({error.msg}). "
            "Correct or remove the line."
        ) from error
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise DataError(f"{name}, line {line}: not UTF-8 text. Save it as UTF-8.") from error
    except RecursionError as error:
        raise DataError(f"{name}, line {first_line}: nested too deeply.") from error
    except ValueError as error:
        # whole numbers of thousands of digits
        raise DataError(f"{name}, line {first_line}: {error}. Correct the record.") from error
