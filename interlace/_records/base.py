"""What every record is: frozen, kept as readable JSON, bound to its own fingerprint."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from interlace._coerce import Checked, build, plain
from interlace._files import atomic_write_text, sha256_of
from interlace.errors import CheckpointError, InterlaceError, unknown_name

if TYPE_CHECKING:
    import os

DISTRIBUTION = "interlace-vlm"

_HEADER = ("kind", "schema", "fingerprint")


@functools.cache
def _package_version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _commit() -> str:
    # Only a checkout has its .git right beside the package; an installed copy has none.
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        reference = head.removeprefix("ref: ")
        loose = git / reference
        if loose.is_file():
            return loose.read_text(encoding="utf-8").strip()
        for line in (git / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(" " + reference):
                return line.split()[0]
    except OSError:
        return ""
    return ""


def _loaded_version(module: str) -> str:
    return str(getattr(sys.modules.get(module), "__version__", ""))


def _device() -> str:
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    # A device that was never touched took no part in what is recorded, and must not be woken.
    if torch is None or cuda is None or not cuda.is_initialized():
        return f"cpu ({platform.machine()})"
    return str(cuda.get_device_name(cuda.current_device()))


@dataclass(frozen=True)
class Provenance(Checked):
    """Where a record was made. It is no part of the fingerprint.

    Attributes:
        package_version: version of this package.
        commit: commit of the checkout it ran from; empty for an installed copy.
        python: version of Python.
        torch: version of torch; empty where it was not loaded.
        transformers: version of transformers; empty where it was not loaded.
        device: name of the GPU in use, or "cpu (machine)".
        seed: the seed of the run, where it had one.
    """

    package_version: str = ""
    commit: str = ""
    python: str = ""
    torch: str = ""
    transformers: str = ""
    device: str = ""
    seed: int | None = None

    @classmethod
    def collect(cls, seed: int | None = None) -> Provenance:
        """Describe this process; looks only at modules that are loaded already."""
        return cls(
            package_version=_package_version(),
            commit=_commit(),
            python=platform.python_version(),
            torch=_loaded_version("torch"),
            transformers=_loaded_version("transformers"),
            device=_device(),
            seed=seed,
        )


def _readable(value: Any, indent: int = 0) -> str:
    # json.dumps puts every number of a table on a line of its own; records are to be read.
    pad, inner = "  " * indent, "  " * (indent + 1)
    if isinstance(value, dict) and value:
        rows = [f"{inner}{json.dumps(k)}: {_readable(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{pad}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        rows = [inner + _readable(item, indent + 1) for item in value]
        return "[\n" + ",\n".join(rows) + f"\n{pad}]"
    return json.dumps(value, allow_nan=False)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [key for key, _ in pairs]
        twice = sorted({key for key in names if names.count(key) > 1})
        raise ValueError(f"the key {', '.join(twice)} stands twice")
    return made


def parse_object(text: str, source: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: not JSON, not an object, or a key that stands twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source} is not valid JSON ({error}). It is damaged or not a record; make it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} holds a JSON {type(value).__name__}, not a record.")
    return value


def read_record_text(path: str | os.PathLike[str]) -> str:
    """Read the text of a record file.

    Raises:
        CheckpointError: missing, a folder, not readable or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no record at {path}. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"Cannot read the record {path} ({error}).") from error


@dataclass(frozen=True, kw_only=True)
class Record(Checked):
    """Base of all records.

    Attributes:
        inputs: fingerprints of what the record was made from, by name ("model", "data", ...).
        provenance: where it was made; no part of the fingerprint nor of equality.
    """

    kind: ClassVar[str] = "record"
    schema: ClassVar[int] = 1

    inputs: dict[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance.collect, compare=False)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        # what notebooks show of a cell's last value: the table, not every number
        printer.text(str(self))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the record's own content, provenance left out."""
        return sha256_of({"kind": self.kind, "schema": self.schema, **self._content()})

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = plain(self)
        del content["provenance"]
        return content

    def to_json(self) -> str:
        """Return the record as readable JSON, fingerprint and provenance included."""
        header = dict(zip(_HEADER, (self.kind, self.schema, self.fingerprint), strict=True))
        content = {**self._content(), "provenance": plain(self.provenance)}
        return _readable({**header, **content}) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "") -> Self:
        """Read a record and verify it.

        Args:
            text: what `to_json` gave.
            source: where the text is from, for messages; default: the kind of the record.

        Raises:
            CheckpointError: not JSON, another kind, another schema version, unknown or missing
                keys, values that do not fit, or content that does not match its fingerprint.
        """
        source = source or f"The {cls.kind} record"
        data = parse_object(text, source)
        if data.get("kind") != cls.kind:
            raise CheckpointError(
                f"{source} is of kind {data.get('kind')!r}, but {cls.kind!r} is expected. "
                "Give the file of the right stage."
            )
        if data.get("schema") != cls.schema:
            raise CheckpointError(
                f"{source} has schema version {data.get('schema')!r}; this version of the package "
                f"reads {cls.schema} only. Make the record again, or use the version that made it."
            )
        known = [*_HEADER, *(each.name for each in dataclasses.fields(cls))]
        for key in data:
            if key not in known:
                raise CheckpointError(f"{source}: {unknown_name('key', key, known)}")
        missing = [key for key in known if key not in data]
        if missing:
            raise CheckpointError(f"{source} lacks {', '.join(missing)}. Make the record again.")
        content = {key: value for key, value in data.items() if key not in _HEADER}
        try:
            record: Self = build(cls, content, cls.kind)
        except InterlaceError as error:
            raise CheckpointError(f"{source} cannot be used. {error}") from error
        if record.fingerprint != data["fingerprint"]:
            raise CheckpointError(
                f"{source} was altered after it was written: its content has the fingerprint "
                f"{record.fingerprint[:12]}..., the file says {str(data['fingerprint'])[:12]}... "
                "Make the record again instead of editing it."
            )
        return record

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record to a file, whole or not at all, and return the path."""
        return atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a record from a file and verify it; see `from_json` for the errors."""
        return cls.from_json(read_record_text(path), source=str(path))
