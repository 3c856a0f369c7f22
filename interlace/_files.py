"""Files and folders that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT)


def sha256_of(value: Any) -> str:
    """Return the SHA-256 (64 hex digits) of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 (64 hex digits) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error means that the disk or the quota is full.

    Writers in compiled libraries wrap the operating system's error into types of their own and
    keep only its text, so the text counts as well.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return "no space left on device" in str(error).lower()


def disk_full_message(path: str | os.PathLike[str]) -> str:
    """Word the error for a disk that filled up while `path` was written."""
    return (
        f"The disk is full: could not write {os.fspath(path)}. Nothing was left behind there. "
        "Free some space or choose another place, then run again."
    )


def _sibling(path: Path) -> Path:
    # The same folder, hence the same file system: only there is a rename atomic.
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_parts(path: Path) -> None:
    """Remove what killed processes left of a folder that they were making.

    Args:
        path: the folder; nobody else may be making it now.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"Cannot create the folder {path.parent} ({error.strerror}). Choose another place."
        ) from error


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the entries of a folder are on disk, where the file system can tell."""
    # A rename survives a power cut only once the folder entry itself is on disk. Some file
    # systems refuse to open or sync folders, which costs nothing but that guarantee.
    with contextlib.suppress(OSError):
        sync(folder)


def _check_plain(path: Path) -> None:
    # a rename would put a file in its place, for everybody
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(
            f"{path} is a device or a pipe, which is not written to but replaced. Name a file."
        )


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file so that readers see either the old content or the new, never a part.

    Args:
        path: the file; missing parent folders are created, an existing file is replaced.
        data: the whole content.

    Returns:
        The path.

    Raises:
        CheckpointError: the file cannot be written; an older file is untouched then.
        ConfigError: it is a device or a pipe.
    """
    target = Path(path)
    _check_plain(target)
    _make_parent(target)
    temporary = _sibling(target)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise CheckpointError(disk_full_message(target)) from error
        raise CheckpointError(
            f"Cannot write {target} ({error.strerror}). Check the path and its permissions."
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)
    return target


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 text file; see `atomic_write_bytes`."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return an output that a caller named as a path. Raises ConfigError for anything else."""
    if not isinstance(path, str | os.PathLike) or path == "":
        raise ConfigError(f"The output is {path!r}; give the path of a folder.")
    return Path(path)


def home_path(text: str | os.PathLike[str]) -> Path:
    """Read a path that may begin with ~; a shell leaves it alone in quotes and behind "=".

    Raises:
        ConfigError: it is empty, or there is no such home folder.
    """
    if text == "":
        # pathlib would take it for the working folder
        raise ConfigError("A path is empty. Name a file or folder, or . for the working folder.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"There is no home folder for {os.fspath(text)!r}. Check the name behind ~, or write "
            f"./{os.fspath(text)} for a file or folder that is called so."
        ) from error


def check_place(path: str | os.PathLike[str]) -> None:
    """Find out whether a file or folder could be made, before any work is spent on its content.

    Args:
        path: what is to be made; neither it nor its parent folders need to exist.

    Raises:
        CheckpointError: the nearest folder above it that exists is none, or cannot be written to.
    """
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        # Asking for rights is not enough: file systems refuse for other reasons too.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"Cannot create {os.fspath(path)} in {folder} ({error.strerror or error}). "
            "Choose another place."
        ) from error


def _check_spared(target: Path, inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    # names of hub models and data sets stand among the inputs too, and are no paths
    for each in inputs:
        if each is None or not home_path(each).exists():
            continue
        if home_path(each).resolve().is_relative_to(target.resolve()):
            raise ConfigError(
                f"Refusing to replace {target}: {os.fspath(each)} is read from there. Choose "
                "another output."
            )


def check_new_file(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> Path:
    """Refuse an output file that exists or cannot be made, before any work is spent on it.

    Args:
        path: the file that is to be written.
        overwrite: allow an existing file, which will then be replaced.
        inputs: what is read to make it, and must not be replaced.

    Returns:
        The path.

    Raises:
        ConfigError: the file exists and `overwrite` is off, or a folder, device, pipe or input is
            in its place.
        CheckpointError: see `check_place`.
    """
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder. Name a file to write.")
    _check_plain(target)
    if target.exists() and not overwrite:
        raise ConfigError(
            f"{target} exists already. Choose another name, or allow overwriting (--overwrite)."
        )
    _check_spared(target, inputs)
    check_place(target)
    return target


def check_new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Refuse an output folder that exists, before any work is spent on filling it.

    Args:
        path: the folder that is to be made.
        overwrite: allow an existing folder, which will then be replaced as a whole.

    Returns:
        The path.

    Raises:
        ConfigError: no path is given, the folder exists and `overwrite` is off, a file is in its
            place, or replacing it would remove the working folder.
        CheckpointError: see `check_place`.
    """
    target = as_path(path)
    if not target.exists() and not target.is_symlink():
        check_place(target)
        return target
    if not overwrite:
        raise ConfigError(
            f"The output folder {target} exists already. Choose another one, remove it, or allow "
            "overwriting (overwrite=True, --overwrite, or overwrite = true under [export])."
        )
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target} is not a folder, so it cannot be replaced by one.")
    if Path.cwd().is_relative_to(target.resolve()):
        raise ConfigError(
            f"Refusing to replace {target}: it holds the working folder. Choose another one."
        )
    return target


def check_new_checkpoint(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> Path:
    """Refuse the folder of a new checkpoint, before any work is spent on filling it.

    Args:
        path: the folder that is to be made.
        overwrite: allow an existing checkpoint, which will then be replaced as a whole.
        inputs: what is read to make it, and must not be replaced.

    Returns:
        The path.

    Raises:
        ConfigError: see `check_new_folder`; or what is to be replaced is no checkpoint, or holds an
            input.
        CheckpointError: see `check_place`.
    """
    target = check_new_folder(path, overwrite=overwrite)
    if not target.exists():
        return target
    _check_spared(target, inputs)
    found = sorted(each.name for each in target.iterdir())
    if found and "config.json" not in found:
        raise ConfigError(
            f"Refusing to replace {target}: it holds {found[0]} and no config.json, so it is no "
            "checkpoint. Choose another output, or remove the folder."
        )
    return target


def _swap_in(temporary: Path, target: Path, overwrite: bool) -> None:
    check_new_folder(target, overwrite=overwrite)
    if not target.exists():
        temporary.rename(target)
        return
    retired = _sibling(target)
    target.rename(retired)
    try:
        temporary.rename(target)
    except OSError:
        retired.rename(target)
        raise
    shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder that appears under its name only once it is complete.

    Yields a temporary folder beside `path`. It is renamed to `path` when the block ends well,
    and removed with everything in it when the block raises or is interrupted.

    Args:
        path: the folder to make; missing parent folders are created.
        overwrite: replace an existing folder as a whole, once the new one is complete.

    Raises:
        ConfigError: `path` exists and `overwrite` is off.
        CheckpointError: the disk is full or the folder cannot be made.
    """
    target = check_new_folder(path, overwrite=overwrite)
    _make_parent(target)
    temporary = _sibling(target)
    try:
        temporary.mkdir()
        yield temporary
        _swap_in(temporary, target, overwrite)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise CheckpointError(disk_full_message(target)) from error
        raise
    sync_folder(target.parent)
