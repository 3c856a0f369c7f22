"""What a run that can be continued remembers about its output folder.

Every stage leaves a record there. It is taken from the folder again while the key of the stage, a
hash of all that it is made from, stays the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from interlace._files import as_path, atomic_write_text, check_place, sha256_of
from interlace.errors import CheckpointError, ConfigError
from interlace.records import Record

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from interlace.models import VLM

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)

STATE = "run.json"
LOCK = ".lock"


def key_of(vlm: VLM, fingerprint: str) -> str:
    """Return a key of a model as it is run: fingerprint, dtype, processor, generation settings.

    The fingerprint is the same in every precision, with every processor and with all settings of
    generation; results are not.

    Args:
        vlm: the model.
        fingerprint: its own.
    """
    processor: Any = vlm.processor
    # a tokenizer alone cannot be written so; its vocabulary is that of the weights
    written = getattr(processor, "to_json_string", lambda: None)
    tokenizer = getattr(processor, "tokenizer", None)
    templates = [getattr(each, "chat_template", None) for each in (processor, tokenizer)]
    generation = getattr(vlm.model, "generation_config", None)
    generates = generation.to_json_string(ignore_metadata=True) if generation is not None else None
    return sha256_of([fingerprint, str(vlm.dtype), written(), templates, generates])


class Stages:
    """Remembers for every stage of an output folder what it was made from.

    Attributes:
        folder: the output folder.
        skipped: names of the stages that were taken from an earlier run.
        keys: stage -> "key" (what it was made from) and "fingerprint" (of what came of it).
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        """Read what an earlier run left.

        Args:
            output: the output folder; need not exist.

        Raises:
            ConfigError: it is no path, or a file.
            CheckpointError: it cannot be written to, or what an earlier run left is damaged.
        """
        folder = as_path(output)
        if folder.is_file():
            raise ConfigError(f"The output {folder} is a file; name a folder.")
        check_place(folder / STATE)
        self.folder = folder
        self.skipped: list[str] = []
        self.keys: dict[str, dict[str, str]] = {}
        path = folder / STATE
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self.keys = {name: {**key} for name, key in found.items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{path} is damaged ({error}), so nothing tells what the rest of {folder} was "
                    "made from. Remove the folder, or name another one, to run every stage again."
                ) from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder and lock it against other runs for a block.

        Raises:
            ConfigError: another run works in it. A killed one does not keep others out.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / LOCK, timeout=0).acquire()
        except Timeout as error:
            raise ConfigError(
                f"Another run is working in {self.folder}. Wait until it is done, or name another "
                "folder."
            ) from error
        with lock:
            yield

    def is_done(self, name: str, key: str) -> bool:
        """Tell whether a stage was finished with this key."""
        return self.keys.get(name, {}).get("key") == key

    def mark(self, name: str, key: str, fingerprint: str = "") -> None:
        """Note that a stage is finished, and what came of it."""
        self.keys[name] = {"key": key, "fingerprint": fingerprint}
        atomic_write_text(self.folder / STATE, json.dumps(self.keys, indent=2) + "\n")

    def record(self, name: str, kind: type[R], key: str, make: Callable[[], R]) -> R:
        """Load the record of a stage if it still fits `key`, else make and save it."""
        path = self.folder / f"{name}.json"
        if self.is_done(name, key) and path.exists():
            try:
                record = kind.load(path)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} It is of an earlier run in this folder: remove {path} and run again."
                ) from error
            if record.fingerprint == self.keys[name].get("fingerprint"):
                log.info("%s: unchanged, taken from %s", name, path)
                self.skipped.append(name)
                return record
        record = make()
        record.save(path)
        self.mark(name, key, record.fingerprint)
        return record
