"""Images that are opened when needed, checked before use, and confined to a root.

An image source has `open()`, which gives an RGB PIL image or raises a DataError that names the
image, and `identity`, a text that tells its content from any other. Nothing is kept after `open()`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from interlace.errors import DataError

# Raster formats only: some other readers of PIL start an outside program or are rarely tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif")
)
MAX_FILE_BYTES = 256 * 2**20
# Qwen's image processors refuse longer strips, and nobody means one.
MAX_ASPECT_RATIO = 200

# What PIL is known to raise on damaged input, over all formats above.
_DECODE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class ImageSource(Protocol):
    """Anything that opens to an RGB PIL image."""

    def open(self) -> Image.Image:
        """Decode the image. Raises DataError if it cannot be read."""


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(f"{name}: {width} x {height} pixels, more than the limit of {limit}")
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError(f"{name}: {width} x {height} pixels is empty or too long a strip")
    image.load()
    upright = ImageOps.exif_transpose(image) or image
    if upright.mode == "F":
        raise DataError(
            f"{name}: floating-point pixels, of which no file says what is white. Store it with 8 "
            "or 16 bits"
        )
    if upright.mode.startswith("I"):
        # PIL would clip 16-bit grey to white instead of scaling it; some formats hold it in 32 bits
        grey = np.asarray(upright).astype(np.int64).clip(0, 0xFFFF)
        deep = upright.mode != "I" or grey.max() > 0xFF
        upright = Image.fromarray((grey >> 8 if deep else grey).astype(np.uint8))
    if upright.has_transparency_data:
        # as transformers does; what transparent pixels hold is mostly black
        ground = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(ground, upright.convert("RGBA"))
    return upright.convert("RGB")


def decode(data: bytes, name: str) -> Image.Image:
    """Decode an encoded image fully.

    Args:
        data: The bytes of the file.
        name: How errors call the image.

    Returns:
        An upright RGB image.

    Raises:
        DataError: Empty, truncated, not an image, or too large.
    """
    if not data:
        raise DataError(f"{name}: empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return _to_rgb(image, name)
    except _DECODE_ERRORS as error:
        if isinstance(error, UnidentifiedImageError):
            raise DataError(f"{name}: not an image in a known format") from error
        raise DataError(f"{name}: {error or type(error).__name__}") from error


@dataclass(frozen=True)
class FileImage:
    """An image on disk."""

    path: Path

    def open(self) -> Image.Image:
        """Read and decode the file."""
        return decode(self._read(), str(self.path))

    @property
    def identity(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self._read()).hexdigest()

    def _read(self) -> bytes:
        try:
            if not self.path.is_file():
                raise DataError(f"{self.path}: no such file")
            size = self.path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise DataError(f"{self.path}: {size} bytes, more than {MAX_FILE_BYTES}")
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class BytesImage:
    """An encoded image in memory."""

    data: bytes = field(repr=False)
    name: str = "image"

    def open(self) -> Image.Image:
        """Decode the bytes."""
        return decode(self.data, self.name)

    @property
    def identity(self) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class MemoryImage:
    """A PIL image in memory."""

    image: Image.Image = field(repr=False)
    name: str = "image"

    def open(self) -> Image.Image:
        """Give an RGB copy."""
        try:
            return _to_rgb(self.image, self.name)
        except _DECODE_ERRORS as error:
            raise DataError(f"{self.name}: {error or type(error).__name__}") from error

    @property
    def identity(self) -> str:
        """SHA-256 of size and pixels."""
        return pixel_hash(self.open())


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of the size and the pixels of an image."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


def identity_of(image: ImageSource) -> str:
    """A text that tells the content of an image from any other, the same on every machine."""
    identity = getattr(image, "identity", None)
    return identity if isinstance(identity, str) else pixel_hash(image.open())


def inside(root: Path | None, name: str, where: str) -> Path:
    """Resolve an image path and refuse one that leaves the data root.

    Args:
        root: Folder that relative paths start from and that no path may leave, symlinks and `..`
            resolved. None: any local path is accepted.
        name: The path as the data gives it.
        where: File and record, for errors.

    Raises:
        DataError: The path leaves `root`, is remote, or is not a path.
    """
    if "://" in name or name.startswith("data:"):
        raise DataError(
            f"{where}: image {name[:80]!r} is remote or inline; only local files are read. "
            "Download the images and give their paths."
        )
    if not name or "\0" in name:
        raise DataError(f"{where}: {name!r} is not an image path; give a file name.")
    try:
        base = None if root is None else root.resolve()
        path = (Path(name) if base is None else base / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{where}: image path {name!r} cannot be resolved: {error}") from error
    if base is not None and not path.is_relative_to(base):
        raise DataError(
            f"{where}: image path {name!r} leads to {path}, outside the data root {base}. "
            "Move the image below the root, or give the right folder with root=."
        )
    return path


def to_image(value: Any, *, root: Path | None, where: str) -> ImageSource:
    """Make an image source of what a record holds.

    Args:
        value: A path, bytes, a PIL image, or a mapping with `bytes` and `path` as Hugging Face
            data sets store images.
        root: See :func:`inside`.
        where: File and record, for errors.

    Raises:
        DataError: Nothing of the above, or a path that leaves the root.
    """
    if isinstance(value, Image.Image):
        return MemoryImage(value, where)
    if isinstance(value, bytes):
        return BytesImage(value, where)
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return BytesImage(data, f"{where} ({path})" if path else where)
        value = path
    if isinstance(value, str | Path):
        return FileImage(inside(root, str(value), where))
    raise DataError(
        f"{where}: an image is given as {type(value).__name__}; expected a path, bytes, a PIL "
        "image, or a mapping with 'bytes' or 'path'."
    )
