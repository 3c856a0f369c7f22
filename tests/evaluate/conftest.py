from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tiny_processors import with_processor

if TYPE_CHECKING:
    from collections.abc import Callable

    from interlace.models import VLM


@pytest.fixture
def tiny_vlm() -> Callable[..., VLM]:
    """Make a tiny model by family name and seed; models are shared between tests."""
    return with_processor
