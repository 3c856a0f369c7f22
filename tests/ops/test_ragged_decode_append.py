"""The kernel that writes a token into a static cache, in triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from interlace.triton_kernels._cache_append import append


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is present; the gpu lane runs these"
)
@pytest.mark.parametrize("place", [0, 3, 6, 7])
def test_one_place_is_written(place: int) -> None:
    # heads of 5 and 3 elements, tokens before heads in the new keys, a cache within a larger one
    key, value = torch.randn(2, 1, 4, 5).transpose(1, 2), torch.randn(2, 4, 1, 3)
    keys, values = torch.randn(2, 4, 9, 5)[:, :, :7], torch.randn(2, 4, 7, 3)
    expected = keys.clone(), values.clone()
    if place < 7:
        expected[0][:, :, place], expected[1][:, :, place] = key[:, :, 0], value[:, :, 0]
    append(key, value, keys, values, torch.tensor(place))
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
