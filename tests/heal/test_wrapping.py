"""Ways of sharding that healing refuses, in words, before anything trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from interlace.data import Sample
from interlace.errors import ConfigError
from interlace.heal.trainer import HealTrainer


def _trainer(*, save: str = "no", **plugins: Any) -> Any:
    """Stand in for a trainer under a launcher that this machine may not have."""
    return SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(**plugins)),
        args=SimpleNamespace(save_strategy=save),
        is_deepspeed_enabled="deepspeed_plugin" in plugins,
    )


def _samples(*pictured: bool) -> list[Sample]:
    # only whether there is an image counts
    image: Any = object()
    return [Sample("s", "vqa", (image,) if has else (), ()) for has in pictured]


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        (_trainer(fsdp_plugin=SimpleNamespace(fsdp_version=1)), "Set fsdp_version to 2"),
        (_trainer(deepspeed_plugin=SimpleNamespace(zero_stage=3)), "stage 3"),
        (_trainer(deepspeed_plugin=SimpleNamespace(zero_stage=2), save="steps"), "no checkpoints"),
    ],
)
def test_ways_of_sharding_that_cannot_work_are_refused(trainer: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        HealTrainer._check_wrapping(trainer)


def test_ways_of_sharding_that_work_are_taken() -> None:
    HealTrainer._check_wrapping(_trainer())
    HealTrainer._check_wrapping(_trainer(fsdp_plugin=SimpleNamespace(fsdp_version=2)))
    HealTrainer._check_wrapping(_trainer(deepspeed_plugin=SimpleNamespace(zero_stage=2)))


def test_sharded_layers_are_not_run_by_some_processes_alone() -> None:
    sharded = _trainer(fsdp_plugin=SimpleNamespace(fsdp_version=2))
    with pytest.raises(ConfigError, match="2 of 3 samples have images"):
        HealTrainer.check_samples(sharded, _samples(True, False, True))
    HealTrainer.check_samples(sharded, _samples(True, True))
    HealTrainer.check_samples(sharded, _samples(False, False))
    HealTrainer.check_samples(_trainer(), _samples(True, False))
