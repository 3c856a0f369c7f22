"""Images as files hold them, and how many of them a sample names."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

import interlace as il
from interlace.data.images import decode
from interlace.data.samples import Sample, Turn
from interlace.errors import DataError


def _tiff(pixels: Any) -> bytes:
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, format="TIFF")
    return made.getvalue()


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_deep_grey_is_scaled_and_floating_point_refused(kind: Any) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    seen = np.asarray(decode(_tiff(ramp.astype(kind)), "deep"))
    assert seen.mean() == pytest.approx(127.5, abs=1)
    shallow = np.full((64, 64), 200, np.int32)
    assert np.asarray(decode(_tiff(shallow), "shallow")).max() == 200
    with pytest.raises(DataError, match="floating-point pixels"):
        decode(_tiff((ramp / 65535).astype(np.float32)), "flat")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    drawing = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    drawing.putpixel((1, 0), (200, 0, 0, 255))
    drawing.putpixel((2, 0), (0, 0, 0, 128))
    made = io.BytesIO()
    if mode == "P":
        drawing = drawing.quantize(8)
    drawing.convert(mode).save(made, format="PNG")
    seen = decode(made.getvalue(), "drawing")
    assert seen.mode == "RGB"
    ground, red, veil, _ = np.asarray(seen)[0].astype(int)
    assert ground.tolist() == [255] * 3
    assert red == pytest.approx([60] * 3 if mode == "LA" else [200, 0, 0], abs=2)
    assert veil == pytest.approx(127, abs=2)


class _Square:
    def open(self) -> Image.Image:
        return Image.new("RGB", (32, 32))


def _sample(text: str) -> Sample:
    turns = (Turn("user", text), Turn("assistant", "red"))
    return Sample("s", "vqa", (_Square(),) * 3, turns, ("red",))


@pytest.mark.parametrize("text", ["<image>\n<image>\nwhat?", "<image>\nwhat?"])
def test_samples_that_name_other_images_than_they_have_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"'s': [12] <image> placeholders .* but 3 images"):
        il.samples([_sample(text)])
    # models that take no place for an image need none named
    assert len(il.samples([_sample("what?")])) == 1
