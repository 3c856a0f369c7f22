"""Which parts of a fused model record CUDA graphs: its text decoders, and its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from interlace.models.parts import is_absent
from interlace.nn.block_graphs import BlockGraph, Shelf
from interlace.nn.blocks import FusedBlock
from interlace.nn.graphs import CudaRecorder, install
from interlace.nn.layers import FusedAttention
from interlace.nn.report import FuseEntry
from interlace.ops import _overlap

if TYPE_CHECKING:
    from interlace.nn.graphs import Recorder


def text_decoders(target: nn.Module) -> list[nn.Module]:
    """Find the models in a fused model that decode token by token, in fused blocks alone."""
    found = []
    for module in target.modules():
        stacks = [each for each in module.children() if isinstance(each, nn.ModuleList)]
        if isinstance(module, PreTrainedModel) and len(stacks) == 1:
            blocks = list(stacks[0])
            own = [getattr(each, "self_attn", None) for each in blocks]
            own = [each for each in own if not is_absent(each)]
            fused = all(isinstance(each, FusedBlock) for each in blocks)
            if (
                own
                and fused
                and all(
                    isinstance(each, FusedAttention) and hasattr(each, "layer_idx") for each in own
                )
            ):
                found.append(module)
    return found


def record_blocks(target: nn.Module, recorder: Recorder) -> list[BlockGraph]:
    """Let the fused blocks of a model record and replay passes of many tokens.

    Args:
        target: a fused model.
        recorder: of its device.

    Returns:
        What records, one for every block.
    """
    shelf, found = Shelf(recorder), []
    for stack in target.modules():
        if isinstance(stack, nn.ModuleList):
            blocks = [each for each in stack if isinstance(each, FusedBlock)]
            for block in blocks:
                graph = BlockGraph(shelf, is_last=block is blocks[-1])
                block.interlace_state.graph = graph
                found.append(graph)
    return found


def record(
    target: nn.Module, names: dict[int, str], graphs: bool | str, *, overlap: bool
) -> list[FuseEntry]:
    """Let the decoders and the blocks of a fused model record, where there are CUDA graphs.

    Args:
        target: a fused model.
        names: paths of its modules by their id.
        graphs: as `fuse` takes it.
        overlap: likewise.

    Returns:
        One entry per decoder, and one more where kernels were to overlap.
    """
    decoders = text_decoders(target)
    first = next(target.parameters())
    recorded = bool(graphs) and first.is_cuda
    if recorded:
        install(target, decoders, CudaRecorder(), overlap=overlap)
        record_blocks(target, CudaRecorder())
    why = "there are CUDA graphs on a GPU only" if graphs else "graphs=False"
    made = "CUDA graphs of steps with a static cache, and of blocks"
    found = [("graphs", recorded, made, why)]
    if overlap:
        why = _overlap.obstacle(first.device) if recorded else f"no steps are recorded: {why}"
        found.append(("overlap", not why, "kernels of recorded steps overlap", why))
    return [
        FuseEntry(
            names[id(decoder)],
            type(decoder).__name__,
            part,
            done,
            backend if done else "",
            "" if done else reason,
        )
        for decoder in decoders
        for part, done, backend, reason in found
    ]
