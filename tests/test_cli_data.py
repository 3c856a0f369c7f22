"""Which data commands and recipes read: what says so and can have no effect is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from PIL import Image

import interlace as il
from interlace.config import Recipe
from interlace.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def listing(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"image": "red.png", "caption": f"red {i}"} for i in range(4)]))
    return path


@pytest.mark.parametrize(
    "call",
    [
        ("score", "none", "-o", "OUT"),
        ("prune", "none", "none.json", "-o", "OUT", "--bridges", "fold"),
        ("heal", "none", "none.json", "-o", "OUT"),
        ("eval", "none"),
        ("progressive", "none", "-o", "OUT"),
    ],
)
def test_a_split_of_a_file_is_refused_before_anything_is_opened(
    interlace, listing: Path, tmp_path: Path, call: tuple[str, ...]
) -> None:
    filled = [tmp_path / "out" if part == "OUT" else part for part in call]
    code, _, error = interlace(*filled, "--data", listing, "--split", "test")
    assert code == 2
    assert error.startswith(f"Error: split is 'test', but {listing} has no splits")
    assert "leave split out" in error


def test_recipes_refuse_a_split_of_a_file(listing: Path, tmp_path: Path) -> None:
    sections = {"model": {"path": "none"}, "data": {"source": str(listing)}}
    for name in ("data", "eval"):
        wrong = sections | {name: sections.get(name, {}) | {"split": "train"}}
        with pytest.raises(ConfigError, match=r"'train', but .*rows\.json has no splits"):
            il.run(Recipe.from_dict(wrong), tmp_path / "out")


def test_without_a_split_a_file_is_measured_whole(interlace, listing: Path, tmp_path: Path) -> None:
    written = tmp_path / "report.json"
    code, _, error = interlace("eval", "bundled:clip", "--data", listing, "-o", written)
    assert code == 0, error
    assert json.loads(written.read_text())["num_samples"] == {"retrieval": 4}
