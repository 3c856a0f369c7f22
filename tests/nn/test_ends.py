"""The first and the last product of a fused model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import interlace as il
from interlace.nn.ends import patches_why_not


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_patches_are_one_product(name: str, kit: Any) -> None:
    model = kit.build(name)
    embedding = model.model.visual.patch_embed
    patches = torch.randn(6, embedding.proj.weight[0].numel())
    plain = embedding(patches)
    report = il.fuse(model)
    assert [e.module for e in report.fused if e.part == "patches"] == ["model.visual.patch_embed"]
    torch.testing.assert_close(embedding(patches), plain)
    heard: list[int] = []
    embedding.proj.register_forward_hook(lambda *_: heard.append(1))
    assert torch.equal(embedding(patches), plain)
    assert heard == [1]
    il.unfuse(model)
    assert torch.equal(embedding(patches), plain)


def test_a_head_reads_rows_that_lie_apart(kit: Any) -> None:
    model = kit.build("qwen3_vl")
    head = model.get_output_embeddings()
    hidden = torch.randn(3, 5, head.in_features)
    plain = head(hidden)
    il.fuse(model)
    torch.testing.assert_close(head(hidden[:, -1:]), plain[:, -1:])
    assert torch.equal(head(hidden), plain)
    il.unfuse(model)
    assert type(head) is nn.Linear


def test_other_convolutions_are_left_alone() -> None:
    def why_not(proj: nn.Module) -> str | None:
        return patches_why_not(nn.ModuleDict({"proj": proj}))

    assert why_not(nn.Conv3d(3, 4, (2, 2, 2), (2, 2, 2))) is None
    assert "every pixel once" in (why_not(nn.Conv3d(3, 4, (2, 2, 2), (1, 2, 2))) or "")
    assert "not a plain nn.Conv3d" in (why_not(nn.Conv2d(3, 4, 2, 2)) or "")
