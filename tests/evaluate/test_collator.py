"""The batches of a model follow its config."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from interlace.data.collate import Collator
from interlace.data.samples import samples
from interlace.errors import ConfigError
from interlace.models import VLM

if TYPE_CHECKING:
    from collections.abc import Callable


def test_what_the_config_says_reaches_the_batch(
    tiny_vlm: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = samples("scenes", count=2, tasks=("caption",))
    writes = tiny_vlm("blip_caption")
    monkeypatch.setattr(writes.model.config.text_config, "bos_token_id", 77)
    assert Collator.for_model(writes)(captions)["input_ids"][:, 0].tolist() == [77, 77]
    compares = tiny_vlm("clip")
    monkeypatch.setattr(compares.model.config.text_config, "max_position_embeddings", 9)
    assert Collator.for_model(compares)(captions)["input_ids"].shape == (2, 9)


def test_without_a_processor_there_are_no_batches(tiny_vlm: Callable[..., VLM]) -> None:
    vlm = tiny_vlm("clip")
    with pytest.raises(ConfigError, match="opened without a processor"):
        Collator.for_model(VLM(vlm.model, vlm.family))
