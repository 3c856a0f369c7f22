"""What tests share: no network, fixed seeds, and memory that shows unwritten outputs."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

# before transformers and datasets are imported: no test may wait for a server by mistake
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import numpy as np
import pytest
import torch

# before triton is imported: without a GPU its kernels are interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WHOLE_NUMBER_POISON = -99


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def lost_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a fault the GPU is lost to a process: let xdist start another for the other tests."""
    yield
    if request.node.get_closest_marker("gpu") is None or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN, so that an output that is not written cannot look right."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            real = tensor.is_floating_point() or tensor.is_complex()
            return tensor.fill_(float("nan") if real else _WHOLE_NUMBER_POISON)

        return made

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recipes that commands would run; each such command ends with the error "opened"."""
    from interlace.errors import InterlaceError

    given: list[Any] = []

    def run(recipe: Any, _: object) -> None:
        given.append(recipe)
        raise InterlaceError("opened")

    monkeypatch.setattr("interlace.pipeline.run", run)
    return given


@pytest.fixture
def interlace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `interlace ...` in this process: (exit code, standard output, standard error)."""
    from interlace import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["interlace", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
