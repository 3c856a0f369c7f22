"""Fused models are saved whole by torch.save and read again, with what records in them."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recorders import Replayer

import interlace as il
from interlace.nn import graphs
from interlace.nn.recording import record_blocks, text_decoders

if TYPE_CHECKING:
    from collections.abc import Callable


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("name", "copied"),
    [
        ("blip_caption", copy.deepcopy),
        ("blip_caption", _saved),
        ("clip", _saved),
        ("qwen3_vl", _saved),
    ],
)
def test_fused_models_are_saved_and_copied_whole(
    name: str, copied: Callable[[Any], Any], kit: Any
) -> None:
    # attentions of BLIP that lost heads have classes made at run time before they are fused
    model = kit.narrowed(name)
    inputs = kit.inputs(name, model)
    stock = copy.deepcopy(model)
    il.fuse(model)
    made = copied(model)
    found, wanted = kit.forward(made, inputs), kit.forward(model, inputs)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert [type(each) for each in made.modules()] == [type(each) for each in model.modules()]
    states = [getattr(each, "interlace_state", None) for each in made.modules()]
    merged = [each.merged for each in states if getattr(each, "merged", None) is not None]
    assert bool(merged) == (name != "blip_caption")
    with torch.no_grad():
        assert all(each.serves(each._projections) for each in merged)
    il.unfuse(made)
    again, plain = kit.forward(made, inputs), kit.forward(stock, inputs)
    assert all(torch.equal(again[key], value) for key, value in plain.items())


def test_what_is_read_records_for_itself(kit: Any) -> None:
    model = kit.build("llava")
    plain = kit.generate(copy.deepcopy(model), "llava", cache_implementation="static")
    il.fuse(model)
    own = graphs.install(model, text_decoders(model), Replayer())[0]
    blocks = record_blocks(model, Replayer())
    made = _saved(model)
    decoder = made.model.language_model
    forward, block = vars(decoder)["forward"], decoder.layers[0].interlace_state.graph
    for text in (1, 2, 3):
        assert torch.equal(kit.generate(made, "llava", cache_implementation="static"), plain)
        assert (forward.num_recordings, forward.num_replays) == (1, 5 * text)
    # a prompt is recorded when it comes again
    assert block.num_replays > 0
    assert own.num_recordings + sum(each.num_recordings for each in blocks) == 0
