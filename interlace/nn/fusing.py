"""fuse and unfuse: modules of a loaded model are swapped in place, and swapped back."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from interlace._torch_utils import outside_inference_mode
from interlace.errors import ConfigError
from interlace.models import VLM
from interlace.models.parts import is_absent
from interlace.nn import backends
from interlace.nn.attention import NAME, head_groups
from interlace.nn.blocks import (
    BlockState,
    FusedBlock,
    FusedGatedMLP,
    GatedState,
    arguments,
    first_read,
)
from interlace.nn.ends import FusedHead, FusedPatchEmbed, patches_why_not
from interlace.nn.graphs import remove
from interlace.nn.layers import QKV, CallerState, FusedCaller
from interlace.nn.norms import FusedNorm, rms_why_not
from interlace.nn.projections import Merged
from interlace.nn.recording import record
from interlace.nn.report import FuseEntry, FuseReport
from interlace.nn.shapes import (
    ATTENTIONS,
    BLOCKS,
    BY_INTERFACE,
    GATED_MLPS,
    OTHER_ATTENTIONS,
    OTHER_BLOCKS,
    PATCH_EMBEDDINGS,
    RMS_NORMS,
)
from interlace.nn.swap import Fused, restore, stock_class, swap

if TYPE_CHECKING:
    from collections.abc import Iterator

# Under this name a fused model keeps its configs with the attention that each had chosen.
_KEPT = "interlace_fusion"
_ABSENT = "taken out, so nothing runs; steps of a decoder that lacks attention are not recorded"
_CHOSEN = "_attn_implementation_internal"


# memory that is made in the caller's inference mode could not be trained outside of it
@outside_inference_mode()
def fuse(
    model: VLM | PreTrainedModel,
    *,
    attention: bool = True,
    norms: bool = True,
    mlp: bool = True,
    rope: bool = True,
    ends: bool = True,
    graphs: bool | Literal["auto"] = "auto",
    overlap: bool = False,
) -> FuseReport:
    """Swap the modules of a model for fused ones, in place; `unfuse` swaps them back.

    Names, parameters and hooks stay, so the model is saved, trained and used as before. Projections
    of one input are merged: their weights are laid side by side, and the parameters become views of
    that. A model that shares memory with another (a student and its teacher) gets memory of its own
    for these weights.

    Args:
        model: what `open_model` or `prune` returned, or a transformers model. On the device and in
            the dtype that it will be used in; it may be moved afterwards.
        attention: attention on `ragged_attention` and `ragged_decode`, with merged projections.
        norms: RMSNorms in one pass, and residual add and norm by `bridge_norm`.
        mlp: gated feed-forward parts with gate and up in one product.
        rope: norm and rotary embedding of heads by `qk_norm_rope`; only with `attention`.
        ends: patches of images embedded by a product instead of a convolution, and a head over
            words that reads the last tokens of a batch as one matrix.
        graphs: replay as CUDA graphs the steps of text decoders where `generate` decodes against a
            static cache (`cache_implementation="static"`; its memory is kept for the next text),
            and blocks on shapes that they have seen. "auto" does so on a GPU; True insists.
        overlap: in recorded steps, kernels start before those in front of them have ended, and
            products of up to 4 rows have their weights on the way by then (`skinny_linear`); on
            Hopper or later. Elsewhere the report says that none do. Not yet measured.

    Returns:
        What was replaced by what, and what was left alone and why; print it.

    Raises:
        ConfigError: the model is fused already, is none of transformers, is spread over devices or
            offloaded, nothing of it can be fused, graphs is no such thing, or they are insisted on
            without a GPU, or without attention or norms fused. Whatever is raised, the model is
            left as it was.
    """
    target = _target(model)
    first = next(target.parameters())
    if graphs not in (True, False, "auto"):
        raise ConfigError(f"graphs is {graphs!r}; give 'auto', True or False.")
    if graphs is True and not first.is_cuda:
        raise ConfigError(
            f"graphs=True needs a model on a GPU; this one is on {first.device}. Leave graphs at "
            "'auto'."
        )
    if graphs is True and not (attention and norms):
        raise ConfigError(
            "graphs=True needs attention and norms fused too, and one of them is False. Leave "
            "both at True, or graphs at 'auto'."
        )
    if _KEPT in target.__dict__:
        raise ConfigError(
            f"{type(target).__name__} is fused already, and stays as it is. Call unfuse first to "
            "fuse it in another way."
        )
    if any(isinstance(module, Fused) for module in target.modules()):
        raise ConfigError(
            f"A part of {type(target).__name__}, or a model that it is a part of, is fused "
            "already. Call unfuse on that first."
        )
    if any("_hf_hook" in vars(module) for module in target.modules()):
        raise ConfigError(
            f"accelerate calls the modules of {type(target).__name__} in its own way (a device_map "
            "of several places, or offloading), so fused ones would not run. Load the model on one "
            "device."
        )
    # before the first swap, so that whatever is swapped by then can be swapped back
    target.__dict__[_KEPT] = []
    try:
        entries: list[FuseEntry] = []
        names = {id(module): name for name, module in target.named_modules()}
        if norms:
            entries += _fuse_norms(target, names)
        if attention:
            _choose_attention(target)
            entries += _fuse_attention(target, names, rope=rope)
        if mlp:
            entries += _fuse_mlps(target, names)
        if ends:
            entries += _fuse_ends(target, names)
        if norms:
            entries += _fuse_blocks(target, names)
        entries += [
            FuseEntry(path, kind, "absent", False, reason=_ABSENT)
            for path, module, kind in _named(target, names)
            if is_absent(module)
        ]
        order = {name: place for place, name in enumerate(names.values())}
        entries.sort(key=lambda entry: order[entry.module])
        entries += record(target, names, graphs, overlap=overlap)
        if not any(entry.fused for entry in entries):
            raise ConfigError(
                f"Nothing of {type(target).__name__} can be fused: "
                + (
                    "; ".join(sorted({e.reason for e in entries if e.reason}))
                    or "no part was asked for"
                )
                + ". It was left as it was."
            )
    except BaseException:
        unfuse(target)
        raise
    return FuseReport(type(target).__name__, str(first.device), str(first.dtype), tuple(entries))


@outside_inference_mode()
def unfuse(model: VLM | PreTrainedModel) -> None:
    """Undo `fuse`: the same module objects, with their own classes and memory, as before.

    Raises:
        ConfigError: the model is not fused.
    """
    target = _target(model)
    chosen = target.__dict__.pop(_KEPT, None)
    if chosen is None:
        raise ConfigError(f"{type(target).__name__} is not fused, so there is nothing to undo.")
    remove(target)
    merged = []
    for module in target.modules():
        if isinstance(module, Fused):
            merged.append(getattr(module.interlace_state, "merged", None))
            restore(module)
    for config, implementation in chosen:
        # what was chosen since then stays
        if getattr(config, _CHOSEN) == NAME:
            setattr(config, _CHOSEN, implementation)
    # last, because memory may run out; the model computes the same with or without
    for each in merged:
        if each is not None:
            each.separate()


def _target(model: Any) -> PreTrainedModel:
    target = model.model if isinstance(model, VLM) else model
    if not isinstance(target, PreTrainedModel):
        raise ConfigError(
            f"The model is a {type(model).__name__}; expected what open_model or prune returns, or "
            "a transformers model."
        )
    return target


def _named(target: nn.Module, names: dict[int, str]) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every module with its path and the name of the class that transformers gave it."""
    for module in target.modules():
        yield names[id(module)], module, stock_class(module).__name__


def _fuse_norms(target: nn.Module, names: dict[int, str]) -> list[FuseEntry]:
    entries = []
    for path, module, kind in _named(target, names):
        if kind not in RMS_NORMS:
            continue
        reason = rms_why_not(module)
        if reason is not None:
            entries.append(FuseEntry(path, kind, "norm", False, reason=reason))
            continue
        swap(module, FusedNorm, None)
        entries.append(FuseEntry(path, kind, "norm", True, "torch (rms_norm)"))
    return entries


def _choose_attention(target: PreTrainedModel) -> None:
    """Choose our attention in every config that a layer may read; what was chosen is kept."""
    configs: dict[int, Any] = {}
    modules = dict(target.named_modules())
    for path, layer in modules.items():
        if stock_class(layer).__name__ not in (*ATTENTIONS, *BY_INTERFACE):
            continue
        # the config of the layer, which may be its own, and that of the model that makes its mask
        above = [modules[path[:end]] for end in _ends(path)]
        owner = next(each for each in above if isinstance(each, PreTrainedModel))
        for config in (layer.config, owner.config):
            configs[id(config)] = config
    for config in configs.values():
        target.__dict__[_KEPT].append((config, getattr(config, _CHOSEN)))
        setattr(config, _CHOSEN, NAME)


def _ends(path: str) -> list[int]:
    """Where the paths of the modules around a module end, nearest first."""
    return [*(place for place in range(len(path) - 1, 0, -1) if path[place] == "."), 0]


def _fuse_attention(target: nn.Module, names: dict[int, str], *, rope: bool) -> list[FuseEntry]:
    entries = []
    for path, module, kind in _named(target, names):
        if kind in OTHER_ATTENTIONS:
            reason = OTHER_ATTENTIONS[kind]
            entries.append(FuseEntry(path, kind, "attention", False, reason=reason))
        if kind in BY_INTERFACE:
            swap(module, FusedCaller, CallerState())
            entries.append(
                FuseEntry(path, kind, "attention", True, *_interface_backend(module, target))
            )
        if kind not in ATTENTIONS:
            continue
        mixin, shape = ATTENTIONS[kind]
        state = dataclasses.replace(shape, rope=shape.rope and rope)
        layer: Any = module
        reason = ""
        if all(hasattr(layer, name) for name in QKV):
            projections = [getattr(layer, name) for name in QKV]
            reason = Merged.why_not(projections) or ""
            if not reason:
                state.merged = Merged(projections)
            num_heads, num_kv_heads = backends.head_counts(layer, layer.head_dim)
            first, decodes = layer.q_proj, hasattr(layer, "layer_idx")
        else:
            num_heads = num_kv_heads = layer.num_heads
            first, decodes = layer.qkv, False
        like = _like(getattr(first, "weight", None), target)
        swap(module, mixin, state)
        groups = head_groups(layer, num_heads, num_kv_heads)
        backend, limits = backends.attention_backend(
            num_heads, groups, layer.head_dim, like, decodes=decodes
        )
        if shape.rope:
            names_of = (num_heads, num_kv_heads, layer.head_dim, like)
            turned = backends.rope_backend(*names_of) if rope else "torch"
            backend += f", rotation by {turned}"
        if state.merged is not None:
            backend += ", q k v merged"
        elif reason:
            limits = "; ".join(filter(None, (limits, f"projections stay apart: {reason}")))
        entries.append(FuseEntry(path, kind, "attention", True, backend, limits))
    return entries


def _like(weight: Any, target: nn.Module) -> Tensor:
    """A tensor of the device and dtype that a projection computes in."""
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    # quantised weights are integers, or no tensors at all; norms stay as they are
    return next(each for each in target.parameters() if each.is_floating_point())


def _interface_backend(layer: Any, target: nn.Module) -> tuple[str, str]:
    """What computes attention of a layer that is not swapped and calls our attention by itself."""
    head_dim = getattr(layer, "head_dim", None) or layer.attention_head_size
    num_heads, num_kv_heads = backends.head_counts(layer, head_dim)
    like = _like(next(layer.parameters(), None), target)
    groups = head_groups(layer, num_heads, num_kv_heads)
    decodes = getattr(layer, "layer_idx", None) is not None
    return backends.attention_backend(num_heads, groups, head_dim, like, decodes=decodes)


def _fuse_mlps(target: nn.Module, names: dict[int, str]) -> list[FuseEntry]:
    entries = []
    for path, module, kind in _named(target, names):
        if kind not in GATED_MLPS:
            continue
        layer: Any = module
        projections = (layer.gate_proj, layer.up_proj)
        reason = Merged.why_not(projections)
        if reason is not None:
            entries.append(FuseEntry(path, kind, "mlp", False, reason=reason))
            continue
        swap(module, FusedGatedMLP, GatedState(Merged(projections)))
        entries.append(FuseEntry(path, kind, "mlp", True, "torch, gate and up merged"))
    return entries


def _fuse_ends(target: PreTrainedModel, names: dict[int, str]) -> list[FuseEntry]:
    entries = []
    for path, module, kind in _named(target, names):
        if kind not in PATCH_EMBEDDINGS:
            continue
        reason = patches_why_not(module)
        if reason is None:
            swap(module, FusedPatchEmbed, None)
            entries.append(FuseEntry(path, kind, "patches", True, "torch, one product"))
        else:
            entries.append(FuseEntry(path, kind, "patches", False, reason=reason))
    head = target.get_output_embeddings()
    if type(head) is nn.Linear:
        swap(head, FusedHead, None)
        entries.append(FuseEntry(names[id(head)], "Linear", "head", True, "torch, rows in one"))
    return entries


def _fuse_blocks(target: nn.Module, names: dict[int, str]) -> list[FuseEntry]:
    entries = []
    for path, module, kind in _named(target, names):
        if kind in OTHER_BLOCKS:
            reason = OTHER_BLOCKS[kind]
            entries.append(FuseEntry(path, kind, "block", False, reason=reason))
        if kind not in BLOCKS:
            continue
        shape = BLOCKS[kind]
        norm = getattr(module, shape.second_norm)
        others, defaults = arguments(module)
        swap(
            module,
            FusedBlock,
            BlockState(**dataclasses.asdict(shape), names=others, defaults=defaults),
        )
        backend = backends.norm_backend(norm.weight.numel(), norm.weight)
        entries.append(FuseEntry(path, kind, "block", True, backend))
    for stack in target.modules():
        _join(stack)
    return entries


def _join(owner: nn.Module) -> None:
    """Tell every block which norm reads its output: that of the next block, or the final one."""
    for stack in owner.children():
        if not isinstance(stack, nn.ModuleList):
            continue
        blocks = [each for each in stack if isinstance(each, FusedBlock)]
        firsts = [first_read(each) for each in blocks]
        final = getattr(owner, "norm", None)
        following = [*firsts[1:], final]
        for block, norm in zip(blocks, following, strict=False):
            if isinstance(norm, nn.Module):
                block.interlace_state.next_norm = (norm,)
