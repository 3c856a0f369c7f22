"""torch.compile(fullgraph=True) of fused towers: no graph breaks, and the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interlace as il
from interlace.nn.cache_memory import CACHE

# towers of which something is fused, each class of transformers once; nothing of T5 and of BLIP's
# text model is
TOWERS = [
    ("blip_caption", "vision_model"),
    ("blip2_opt", "vision_model"),
    ("blip2_opt", "qformer"),
    ("blip2_opt", "language_model.model.decoder"),
    ("clip", "text_model"),
    ("clip", "vision_model"),
    ("llava", "model.language_model"),
    ("llava_next", "model.language_model"),
    ("llava_onevision", "model.language_model"),
    ("qwen2_vl", "model.language_model"),
    ("qwen2_vl", "model.visual"),
    ("qwen2_5_vl", "model.language_model"),
    ("qwen3_vl", "model.language_model"),
    ("qwen3_vl", "model.visual"),
    ("siglip", "text_model"),
    ("siglip", "vision_model"),
    ("siglip2", "text_model"),
    ("siglip2", "vision_model"),
]
_DECODERS = ("language_model", "decoder")


def shallow(kit: Any, name: str) -> Any:
    options: dict[str, Any] = {"text": 1, "vision": 1}
    if name == "qwen3_vl":
        options["deepstack"] = ()
    if name == "qwen2_5_vl":
        # a layer that sees windows, and one that sees all
        options |= {"vision": 2, "full_attention": (1,)}
    if name == "blip2_opt":
        options["qformer"] = 1
    return kit.build(name, **options)


def call_of(kit: Any, name: str, model: Any, path: str) -> tuple[Any, tuple[Any, ...], Any]:
    """A module, and the arguments that the whole model calls it with."""
    module = model.get_submodule(path)
    calls = []
    handle = module.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((args, kwargs)), with_kwargs=True
    )
    kit.forward(model, kit.inputs(name, model))
    handle.remove()
    args, kwargs = calls[0]
    if path.endswith(_DECODERS):
        kwargs = {**kwargs, CACHE: None, "use_cache": False}
    return module, args, kwargs


def compiled(module: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True)


@pytest.mark.parametrize(("name", "path"), TOWERS)
def test_fused_towers_compile_without_graph_breaks(name: str, path: str, kit: Any) -> None:
    model = shallow(kit, name)
    module, args, kwargs = call_of(kit, name, model, path)
    with torch.no_grad():
        plain = module(*args, **kwargs)[0]
        report = il.fuse(model)
        found = compiled(module)(*args, **kwargs)[0]
    assert any(entry.fused and entry.module.startswith(path) for entry in report.entries)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == plain.shape[:2]:
        plain, found = plain[mask.bool()], found[mask.bool()]
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_windows_of_qwen2_5_vl_break_in_transformers(kit: Any) -> None:
    vision = pytest.importorskip("transformers.vision_utils")
    model = shallow(kit, "qwen2_5_vl")
    module, args, kwargs = call_of(kit, "qwen2_5_vl", model, "model.visual")
    with torch.no_grad():
        plain = module(*args, **kwargs)[0]
        with pytest.raises(RuntimeError, match="get_vision_window_index"):
            compiled(module)(*args, **kwargs)
        il.fuse(model)
        with pytest.raises(RuntimeError, match="get_vision_window_index"):
            compiled(module)(*args, **kwargs)
        # what transformers cannot compile is made before, and handed over
        config, grid = module.config, kwargs["grid_thw"]
        sizes = (config.spatial_merge_size, config.window_size, config.patch_size)
        window_index, cu_window_seqlens = vision.get_vision_window_index(grid, *sizes)
        made = {
            "window_index": window_index,
            "cu_window_seqlens": cu_window_seqlens,
            "position_ids": vision.get_vision_position_ids(grid, config.spatial_merge_size),
        }
        found = compiled(module)(*args, **kwargs, **made)[0]
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_training_compiles_without_graph_breaks(kit: Any) -> None:
    torch._dynamo.reset()
    model = kit.build("clip", vision=2).vision_model
    pixels = kit.inputs("clip", model)["pixel_values"]
    plain = model(pixels).last_hidden_state
    loss = plain.square().sum()
    truth = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    il.fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(pixels).last_hidden_state
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)
    for mine, theirs in zip(found, truth, strict=True):
        if theirs is None:
            # compiled code gives zeros for what has no part in the result
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


class _Decoder(torch.nn.Module):
    """A text decoder from words to hidden states."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Run it on words [B, T]."""
        hidden: torch.Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return hidden


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_decoder_takes_texts_of_any_length(strict: bool, kit: Any) -> None:
    model = kit.build("llava", text=2)
    ids = torch.randint(5, 100, (2, 33))
    with torch.no_grad():
        decoder = _Decoder(model.model.language_model)
        plain = decoder(ids)
        il.fuse(model)
        length = torch.export.Dim("length", min=2, max=64)
        # as many words as single projections serve, and as one product serves, outside of exports
        exported = torch.export.export(
            decoder, (ids[:, :9].clone(),), dynamic_shapes=({1: length},), strict=strict
        ).module()
        torch.testing.assert_close(exported(ids), plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(exported(ids[:, :3].clone()), plain[:, :3], rtol=1e-4, atol=1e-4)
