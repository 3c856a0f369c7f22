from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def noise_image(seed: int, side: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def save_image(tmp_path: Path) -> Callable[..., Path]:
    def save(name: str, seed: int = 0, side: int = 32) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed, side).save(path)
        return path

    return save


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[..., Path]:
    def write(records: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            path.write_text(json.dumps(records))
        return path

    return write


@pytest.fixture
def llava_file(
    save_image: Callable[..., Path], write_json: Callable[..., Path]
) -> Callable[..., Path]:
    """A LLaVA file of `count` records, each with its own image."""

    def make(count: int, name: str = "data.json") -> Path:
        records = []
        for index in range(count):
            save_image(f"images/{index}.png", seed=index, side=8)
            records.append(
                {
                    "id": f"r{index}",
                    "image": f"images/{index}.png",
                    "conversations": [
                        {"from": "human", "value": "<image>\nwhat is it?"},
                        {"from": "gpt", "value": f"thing {index}"},
                    ],
                }
            )
        return write_json(records, name)

    return make
