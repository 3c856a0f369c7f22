"""The tiny models that come with the package, trained on the built-in scenes.

They exist so that the whole flow can be seen, tested and measured anywhere in minutes: every one of
them really solves its tasks on held-out scenes. `open_model("bundled:qwen3-vl")` opens one.
How they were made: `interlace/bundled/train.py`.
"""

from __future__ import annotations

from pathlib import Path

from interlace.errors import ConfigError, unknown_name

__all__ = ["NAMES", "PREFIX", "resolve"]

PREFIX = "bundled:"
NAMES = ("qwen3-vl", "clip", "blip")
_FOLDER = Path(__file__).resolve().parent.parent / "assets"


def resolve(model: str) -> str:
    """Turn `bundled:NAME` into the folder of that model; any other text is returned as it is.

    Raises:
        ConfigError: no model of that name is bundled, or its files are missing.
    """
    if not model.startswith(PREFIX):
        return model
    name = model.removeprefix(PREFIX)
    if name not in NAMES:
        raise ConfigError(unknown_name("bundled model", name, NAMES))
    folder = _FOLDER / name
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"The bundled model '{name}' is not in this installation (expected in {folder}). "
            f"Train it with: python -m interlace.bundled.train {name} --output {folder}"
        )
    return str(folder)
