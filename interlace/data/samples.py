"""The one shape every data source is turned into, and the seeded choice of samples from a source.

A :class:`Sample` holds images that are opened when they are needed, a conversation, and reference
answers. :func:`samples` reads any supported source and gives a :class:`Samples` sequence.
"""

from __future__ import annotations

import hashlib
import json
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from interlace._files import home_path
from interlace.errors import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    from interlace.data.images import ImageSource

TASKS = ("chat", "vqa", "caption", "retrieval")
IMAGE_PLACEHOLDER = "<image>"
_SCENES_TASKS = {"chat": ("vqa", "caption"), "vqa": ("vqa",), "caption": ("caption",)}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: `"system"`, `"user"` or `"assistant"`.
        text: What is said; a user text holds one `<image>` per image of the sample, in order.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """One record: images, a conversation about them, and what counts as a right answer.

    Attributes:
        id: Name of the record inside its source.
        task: One of :data:`TASKS`.
        images: Anything with `open()` that gives an RGB PIL image.
        turns: The conversation; a system turn first if there is one, then user and assistant in
            turn. A caption is the answer to a request for a description.
        references: Accepted answers (vqa) or reference captions (caption, retrieval).
        group: Sub-task such as `"colour"` or `"count"`; empty if there is none.
    """

    id: str
    task: str
    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    group: str = ""


class RecordReader(Protocol):
    """What a source offers to the choice of samples: a length and random access."""

    name: str

    def __len__(self) -> int:
        """Give the number of records."""

    def read(self, index: int) -> Sample:
        """Parse record `index`; its images are not opened yet. Raises DataError."""


class Samples(Sequence[Sample]):
    """An immutable sequence of samples that knows where it comes from.

    Attributes:
        source: The file, folder or data set that the samples were taken from.
        seed: Seed of the choice.
        num_skipped: Records left out because they could not be used.
        processor: The processor of the model that they were checked for, if given.
    """

    def __init__(
        self,
        items: Sequence[Sample],
        *,
        source: str = "memory",
        seed: int = 0,
        num_skipped: int = 0,
        processor: Any = None,
    ) -> None:
        """Hold `items`; nothing is opened or copied."""
        self._items = tuple(items)
        self.source = source
        self.seed = seed
        self.num_skipped = num_skipped
        self.processor = processor

    def __len__(self) -> int:
        """Give the number of samples."""
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Samples: ...

    def __getitem__(self, index: int | slice) -> Sample | Samples:
        """Give one sample, or for a slice another :class:`Samples`."""
        if isinstance(index, slice):
            return self._with(self._items[index])
        return self._items[index]

    def __repr__(self) -> str:
        """Name the source and the size."""
        return f"Samples({len(self)} from {self.source!r}, seed={self.seed})"

    def subset(self, num_samples: int) -> Samples:
        """Give the first `num_samples` samples (all of them if there are fewer)."""
        given: Any = num_samples
        if not isinstance(given, numbers.Integral) or given < 1:
            raise ConfigError(f"subset of {num_samples} samples: give a whole number, 1 or more.")
        return self._with(self._items[:num_samples])

    def select(self, places: Iterable[int]) -> Samples:
        """Give the samples at some places, in the order of these."""
        return self._with([self._items[place] for place in places])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids, tasks, texts, references and image contents, in order."""
        from interlace.data.images import identity_of

        digest = hashlib.sha256()
        for sample in self._items:
            content = [
                sample.id,
                sample.task,
                [[turn.role, turn.text] for turn in sample.turns],
                list(sample.references),
                sample.group,
                [identity_of(image) for image in sample.images],
            ]
            digest.update(json.dumps(content, ensure_ascii=True).encode("ascii"))
            digest.update(b"\n")
        return digest.hexdigest()

    def _with(self, items: Sequence[Sample]) -> Samples:
        return Samples(
            items,
            source=self.source,
            seed=self.seed,
            num_skipped=self.num_skipped,
            processor=self.processor,
        )


def samples(
    source: Any,
    *,
    count: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
    split: str | None = None,
    tasks: Sequence[str] | None = None,
    root: str | Path | None = None,
    processor: Any = None,
    max_bad_fraction: float = 0.01,
    streaming: bool = False,
) -> Samples:
    """Read samples from any supported source.

    Which records are taken is drawn by `seed` with equal probability for all, and is the same in
    every process. Every image taken is decoded once; a record with a bad one is left out, counted,
    and replaced by a further one where the source has more, as is one of an unknown layout, or that
    the processor refuses.

    Args:
        source: `"scenes"` (the built-in data), a .json or .jsonl file, a folder of images with
            captions, a Hugging Face data set (name, `name:subset`, folder, parquet file or object),
            or a sequence of :class:`Sample`.
        count: Number of samples; all if neither this nor `fraction` is given.
        fraction: Fraction of the source in 0..1, instead of `count`.
        seed: Seed of the choice.
        split: Split of the scenes or of a data set that has several; default: "train".
        tasks: Wanted tasks (see :data:`TASKS`). Captions serve retrieval and the reverse, a chat of
            one question and one answer serves vqa; records that serve none are passed over.
        root: Folder that image paths start from and may not leave; the folder of the file if not
            given. Those of a data set given as an object start from the working folder then, and
            may lead anywhere.
        processor: Processor of the model the samples are for. What its chat template refuses, such
            as a system turn, counts as a bad record, instead of ending the work on the samples.
        max_bad_fraction: Largest fraction of the wanted samples that may be skipped because the
            record is not understood, an image is missing or damaged, or the template refuses it.
        streaming: Read a data set of the hub as a stream, keeping a seeded reservoir of encoded
            rows; needs `count`.

    Raises:
        ConfigError: An argument out of range, or one that the source has no use for.
        DataError: The source is missing, empty, not understood, or holds too many bad records.
    """
    if isinstance(tasks, Iterable) and not isinstance(tasks, str):
        tasks = tuple(tasks)
    _check_arguments(count, fraction, seed, tasks, max_bad_fraction)
    if processor is not None and not callable(processor):
        raise ConfigError(
            f"processor is a {type(processor).__name__}; give a loaded one, such as vlm.processor."
        )
    check_source(source, root, split)
    split = split or "train"
    path = home_path(source) if isinstance(source, str | Path) else None
    if streaming and (source == "scenes" or path is None or path.exists()):
        raise ConfigError(
            f"streaming is for data sets of the hub, but the source is {source!r}. Leave it out; "
            "a stream of the datasets library is a source as it is."
        )
    if isinstance(source, str) and source == "scenes":
        items = _scenes(count, seed, split, tasks)
        return Samples(items, source=source, seed=seed, processor=processor)
    # The readers and the choice make samples, and so import this module.
    from interlace.data.sampling import take

    base = None if root is None else home_path(root)
    if base is not None and not base.is_dir():
        raise DataError(f"{base}: no such folder to look for images in; check root.")
    reader = _open(source, split, base, count, seed, streaming)
    if not len(reader):
        raise DataError(f"{reader.name}: holds no samples; give a source with at least one.")
    items, num_skipped = take(reader, count, fraction, seed, tasks, max_bad_fraction, processor)
    return Samples(
        items, source=reader.name, seed=seed, num_skipped=num_skipped, processor=processor
    )


def has_splits(source: Any) -> bool:
    """Tell whether a source of samples has several splits to choose from."""
    from interlace.data import hub

    if hub.is_dataset(source):
        return isinstance(source, Mapping)
    if not isinstance(source, str | Path):
        return False
    path = home_path(source)
    if source == "scenes" or not path.exists():
        return True
    return path.is_dir() and hub.has_splits(path)


def split_to_measure(source: Any, split: str | None) -> str | None:
    """Return which split of a source is measured: the one named, else "test" if it has several."""
    return split or ("test" if has_splits(source) else None)


def check_source(source: Any, root: str | Path | None, split: str | None) -> None:
    """Refuse a root or a split for sources that have no use for it.

    Raises:
        ConfigError: A root for what reads no image files of its own, or a split of what has none.
        DataError: A split that the built-in scenes lack.
    """
    if split is not None:
        if source == "scenes":
            scenes_split(split)
        elif not has_splits(source):
            named = source if isinstance(source, str | Path) else f"the {type(source).__name__}"
            raise ConfigError(
                f"split is {split!r}, but {named} has no splits to choose from: all of it would be "
                "taken. Give the samples of that split as a source of their own, or leave split "
                "out."
            )
    if root is None:
        return
    what = "the built-in scenes are drawn" if source == "scenes" else ""
    if isinstance(source, Sequence) and not isinstance(source, str):
        what = "samples that are made already hold their images"
    if what:
        raise ConfigError(
            f"root is {str(root)!r}, but {what}. Name the data whose images lie there (--data), or "
            "leave root out."
        )


def _check_arguments(
    count: Any,
    fraction: Any,
    seed: Any,
    tasks: Sequence[str] | None,
    max_bad_fraction: Any,
) -> None:
    if count is not None and fraction is not None:
        raise ConfigError(f"count={count} and fraction={fraction} are both given; give one.")
    if count is not None and (not isinstance(count, numbers.Integral) or count < 1):
        raise ConfigError(f"count is {count!r}; give a number of samples of at least 1.")
    if not isinstance(seed, numbers.Integral):
        # None would draw other samples each time
        raise ConfigError(f"seed is {seed!r}; give a whole number.")
    if fraction is not None and not (
        isinstance(fraction, numbers.Real) and 0 < float(fraction) <= 1
    ):
        raise ConfigError(f"fraction is {fraction!r}; give a number above 0 and at most 1.")
    if not (isinstance(max_bad_fraction, numbers.Real) and 0 <= float(max_bad_fraction) <= 1):
        raise ConfigError(f"max_bad_fraction is {max_bad_fraction!r}; give a number in 0..1.")
    if tasks is not None and not (isinstance(tasks, tuple) and tasks):
        raise ConfigError(f"tasks is {tasks!r}; give a sequence of {', '.join(TASKS)}.")
    for task in tasks or ():
        if task not in TASKS:
            raise ConfigError(unknown_name("task", task, TASKS))


def _scenes(
    count: int | None, seed: int, split: str, tasks: Sequence[str] | None
) -> Sequence[Sample]:
    from interlace.data.scenes import make_scenes

    if count is None:
        raise ConfigError("The built-in scenes have no end; say how many samples with count=.")
    chosen = scenes_split(split)
    return make_scenes(count, tasks=tuple(tasks or ("vqa", "caption")), seed=seed, split=chosen)


def scenes_tasks(objective: str) -> tuple[str, ...]:
    """Return the tasks of the built-in scenes that a model of some objective can learn from."""
    return _SCENES_TASKS.get(objective, ("retrieval",))


def scenes_split(name: str) -> Literal["train", "test"]:
    """Return the name of a split of the built-in scenes; DataError for any other."""
    if name not in ("train", "test"):
        raise DataError(unknown_name("split of scenes", name, ("train", "test")))
    return "train" if name == "train" else "test"


def _open(
    source: Any, split: str, root: Path | None, count: int | None, seed: int, streaming: bool
) -> RecordReader:
    from interlace.data import conversations, folders, hub
    from interlace.data.sampling import SampleList

    if hub.is_dataset(source):
        return hub.open_object(source, split=split, root=root, count=count, seed=seed)
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return SampleList(source)
    if not isinstance(source, str | Path):
        raise DataError(
            f"A {type(source).__name__} is no source of samples; give 'scenes', a file, a folder, "
            "a data set or a sequence of Sample."
        )
    path = home_path(source)
    kind = path.suffix.lower()
    if path.is_dir():
        if hub.is_dataset_folder(path):
            return hub.open_saved(path, split=split, root=root, count=count, seed=seed)
        return folders.open_folder(path, root)
    if path.is_file():
        if kind == ".parquet":
            return hub.open_saved(path, split=split, root=root, count=count, seed=seed)
        if kind in (".json", ".jsonl"):
            return conversations.open_annotations(path, root)
        raise DataError(f"{path}: a {kind or 'nameless'} file; expected .json, .jsonl or .parquet.")
    if kind in (".json", ".jsonl", ".parquet") or str(source).startswith(("/", ".", "~")):
        raise DataError(f"{path}: no such file or folder; check the path.")
    return hub.open_hub(
        str(source), split=split, root=root, count=count, seed=seed, streaming=streaming
    )
