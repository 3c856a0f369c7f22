"""Hugging Face data sets: by name, from a local folder or parquet file, or as an object.

Images are never decoded by `datasets`: a row is read from Arrow, and an image of a map-style data
set stays where it is until it is opened.
"""

from __future__ import annotations

import difflib
import logging
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.data.conversations import RecordList
from interlace.data.images import BytesImage, to_image
from interlace.data.schemas import sample_from_record
from interlace.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from interlace.data.images import ImageSource
    from interlace.data.samples import RecordReader, Sample

logger = logging.getLogger(__name__)

# owner/name or name, and after a colon the configuration (subset)
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w. ()+,/-]+)?")
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_SPLITS = ("train", "test", "validation", "val", "dev")
_SPARES = 16


@dataclass(frozen=True)
class _RowImage:
    """One image of one row of a map-style data set, read when it is opened."""

    rows: _Rows = field(repr=False)
    index: int
    column: str
    position: int
    where: str

    def open(self) -> Image.Image:
        """Read the row and decode the image."""
        return self._load().open()

    @property
    def identity(self) -> str:
        """SHA-256 of the encoded image."""
        return str(getattr(self._load(), "identity", ""))

    def _load(self) -> ImageSource:
        value = self.rows.value(self.index, self.column)
        if isinstance(value, list | tuple):
            value = value[self.position]
        return to_image(value, root=self.rows.root, where=self.where)


class _Rows:
    """Rows of a map-style data set with images left encoded."""

    def __init__(self, dataset: Any, name: str, root: Path | None) -> None:
        self.name = name
        self.root = root
        self._dataset = dataset.with_format("arrow")
        self._columns: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def value(self, index: int, column: str) -> Any:
        """Give one cell without reading the other columns."""
        if column not in self._columns:
            self._columns[column] = self._dataset.select_columns([column])
        return self._columns[column][index].to_pylist()[0][column]

    def read(self, index: int) -> Sample:
        """Parse row `index`."""
        where = f"{self.name}, row {index}"

        def make(value: Any, column: str | None, position: int) -> ImageSource:
            image = to_image(value, root=self.root, where=where)
            if column is None or not isinstance(image, BytesImage):
                return image
            return _RowImage(self, index, column, position, where)

        return sample_from_record(
            self._dataset[index].to_pylist()[0],
            where=where,
            default_id=f"{Path(self.name).name}-{index}",
            make_image=make,
        )


def is_dataset(source: object) -> bool:
    """Whether `source` is an object of the `datasets` library; imports nothing."""
    return type(source).__module__.partition(".")[0] == "datasets"


def is_dataset_folder(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` or holds parquet files."""
    if any((folder / name).is_file() for name in _SAVED):
        return True
    return next(folder.rglob("*.parquet"), None) is not None


def has_splits(folder: Path) -> bool:
    """Whether a folder is a data set of several splits."""
    if any((folder / name).is_file() for name in _SAVED):
        return (folder / "dataset_dict.json").is_file()
    return any(words.intersection(_SPLITS) for words in _parquet_files(folder).values())


def open_object(
    dataset: Any, *, split: str, root: Path | None, count: int | None, seed: int, name: str = ""
) -> RecordReader:
    """Read a Dataset, a DatasetDict, or their streaming kinds.

    Args:
        dataset: The object.
        split: Split to take from a dictionary of splits.
        root: Folder that image paths may not leave; None if the object is trusted with any path.
        count: Number of samples wanted; a stream needs it.
        seed: Seed of the choice from a stream.
        name: How errors call the data set.
    """
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise DataError(
                f"{name or 'data set'}: no split {split!r}. It has {', '.join(map(str, dataset))}; "
                "choose one with split=."
            )
        dataset = dataset[split]
    name = name or str(getattr(dataset.info, "dataset_name", None) or "data set")
    if hasattr(dataset, "__len__") and hasattr(dataset, "select_columns"):
        return _Rows(dataset, name, root)
    return _reservoir(dataset, name, root, count, seed)


def open_saved(
    path: Path, *, split: str, root: Path | None, count: int | None, seed: int
) -> RecordReader:
    """Read a folder of `save_to_disk`, or parquet files (a folder of them, or one)."""
    datasets = _datasets()
    base = root or (path if path.is_dir() else path.parent)
    try:
        if path.is_dir() and any((path / name).is_file() for name in _SAVED):
            dataset = datasets.load_from_disk(str(path))
        else:
            files = [path] if path.is_file() else _files_of_split(path, split)
            dataset = datasets.load_dataset(
                "parquet", data_files=[str(file) for file in files], split="train"
            )
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: cannot be read as a data set: {error}") from error
    return open_object(dataset, split=split, root=base, count=count, seed=seed, name=str(path))


def open_hub(
    name: str,
    *,
    split: str,
    root: Path | None,
    count: int | None,
    seed: int,
    streaming: bool,
) -> RecordReader:
    """Load a data set by name (`owner/name` or `owner/name:subset`) from the Hugging Face hub."""
    if not _NAME.fullmatch(name):
        raise DataError(
            f"{name!r} is neither an existing file or folder nor the name of a Hugging Face data "
            "set (owner/name or owner/name:subset)."
        )
    datasets = _datasets()
    repository, _, subset = name.partition(":")
    try:
        dataset = datasets.load_dataset(
            repository, subset or None, split=split, streaming=streaming
        )
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        near = " Did you mean 'scenes', the built-in data?" if _like_scenes(name) else ""
        raise DataError(
            f"Data set {name!r} (split {split!r}) cannot be loaded: {reason}.{near} If it is a "
            "file or folder, check the path; if it is on the hub, this needs a network or a filled "
            "cache."
        ) from error
    base = root or Path(datasets.config.HF_CACHE_HOME)
    return open_object(dataset, split=split, root=base, count=count, seed=seed, name=name)


def _like_scenes(name: str) -> bool:
    return bool(difflib.get_close_matches(name.lower(), ["scenes"], cutoff=0.7))


def _datasets() -> Any:
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        raise DataError(
            "Reading Hugging Face data sets needs the package 'datasets': pip install datasets."
        ) from error
    return datasets


def _parquet_files(folder: Path) -> dict[Path, set[str]]:
    """Parquet files in order, with the words of their path."""
    return {
        file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower()))
        for file in sorted(folder.rglob("*.parquet"))
    }


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Parquet files of one split, told by the words of their path; all if no split is named."""
    files = _parquet_files(folder)
    named = sorted({word for words in files.values() for word in words if word in _SPLITS})
    if not named:
        return list(files)
    chosen = [file for file, words in files.items() if split.lower() in words]
    if not chosen:
        raise DataError(
            f"{folder}: no parquet file of split {split!r}. It has {', '.join(named)}; choose one "
            "with split=."
        )
    return chosen


def _reservoir(
    stream: Any, name: str, root: Path | None, count: int | None, seed: int
) -> RecordReader:
    """Keep `count` rows and a few spares of a stream, every row with the same probability.

    Source: Vitter, Random sampling with a reservoir, algorithm R.
    """
    if count is None:
        raise DataError(f"{name}: a stream has no known length; say how many samples with count=.")
    if getattr(stream, "features", None):
        # Keeps the images encoded: a decoded one takes ten times the memory.
        stream = stream.decode(False)
    # Another series than the permutation that the caller draws from the rows kept.
    rng = random.Random(f"stream {seed}")
    capacity = count + _SPARES
    kept: list[tuple[int, Any]] = []
    for index, row in enumerate(stream):
        if index < capacity:
            kept.append((index, row))
            continue
        place = rng.randrange(index + 1)
        if place < capacity:
            kept[place] = (index, row)
    # Rows that were never replaced stand first and in order; the caller draws a permutation.
    kept.sort(key=lambda entry: entry[0])
    rows = [{"id": f"{Path(name).name}-{index}", **row} for index, row in kept]
    if not rows:
        raise DataError(f"{name}: the stream holds no rows.")
    return RecordList(rows, name=name, stem=Path(name).name, root=root)
