"""Which parts of a fused model record CUDA graphs: its text decoders, and stacks of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from interlace.models.discovery import routes
from interlace.models.parts import is_absent
from interlace.nn.block_graphs import BlockGraph, Shelf, attends_by_ours
from interlace.nn.blocks import FusedBlock
from interlace.nn.graphs import install
from interlace.nn.layers import FusedAttention
from interlace.nn.recorders import CudaRecorder
from interlace.nn.report import FuseEntry
from interlace.ops import _overlap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from interlace.nn.recorders import Recorder


def text_decoders(target: nn.Module) -> list[nn.Module]:
    """Find the models in a fused model that decode token by token, in fused blocks alone."""
    found = []
    for module in target.modules():
        stacks = [each for each in module.children() if isinstance(each, nn.ModuleList)]
        if isinstance(module, PreTrainedModel) and len(stacks) == 1:
            blocks = list(stacks[0])
            own = [getattr(each, "self_attn", None) for each in blocks]
            own = [each for each in own if not is_absent(each)]
            fused = all(isinstance(each, FusedBlock) and not _routes(each) for each in blocks)
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
    for owner, stack in _stacks(target):
        named = list(stack.named_children())
        following = [name for name, _ in named[1:]]
        # DeepStack hands what these give to a module of its own too
        read_twice = getattr(owner, "deepstack_visual_indexes", ())
        for place, (_, block) in enumerate(named):
            if isinstance(block, FusedBlock) and not _routes(block):
                alone = place == len(following) or place in read_twice
                graph = BlockGraph(shelf, stack, "" if alone else following[place])
                block.interlace_state.graph = graph
                found.append(graph)
    return found


def _routes(block: nn.Module) -> bool:
    """Tell whether tokens are sent to experts in a block: not tried yet with recordings."""
    return any(map(routes, block.modules()))


def _stacks(target: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Yield every stack with fused blocks in it, after the module that it belongs to."""
    for owner in target.modules():
        for stack in owner.children():
            if isinstance(stack, nn.ModuleList) and any(isinstance(x, FusedBlock) for x in stack):
                yield owner, stack


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
        One entry per decoder and per other module with a stack of fused blocks; one more for each
        decoder where kernels were to overlap.
    """
    decoders = text_decoders(target)
    first = next(target.parameters())
    why = "" if first.is_cuda else "there are CUDA graphs on a GPU only"
    if not graphs:
        why = "graphs=False"
    if not why:
        install(target, decoders, CudaRecorder(first.device), overlap=overlap)
        record_blocks(target, CudaRecorder(first.device))
    found: list[FuseEntry] = []
    for decoder in decoders:
        made = "CUDA graphs of steps with a static cache, and of blocks"
        found.append(_entry(decoder, names, "graphs", made, why))
        if overlap:
            obstacle = f"no steps are recorded: {why}" if why else _overlap.obstacle(first.device)
            made = "kernels of recorded steps overlap"
            found.append(_entry(decoder, names, "overlap", made, obstacle))
    for owner, stack in _stacks(target):
        if not any(owner is decoder for decoder in decoders):
            blocks = [each for each in stack if isinstance(each, FusedBlock)]
            ours = any(attends_by_ours(each) for each in blocks)
            reason = why or ("" if ours else "its attention is not fused")
            if all(map(_routes, blocks)):
                reason = "its layers have experts"
            found.append(_entry(owner, names, "graphs", "CUDA graphs of blocks", reason))
    return found


def _entry(
    module: nn.Module, names: dict[int, str], part: str, made: str, reason: str
) -> FuseEntry:
    """Report that something of a module is made, or the reason why not."""
    backend = "" if reason else made
    return FuseEntry(names[id(module)], type(module).__name__, part, not reason, backend, reason)
