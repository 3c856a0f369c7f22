"""Fused blocks: add and norm in one op, and feed-forward parts with one projection in."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import SiLUActivation

from interlace import ops
from interlace.models.parts import is_absent
from interlace.nn.cache_memory import by_new_name
from interlace.nn.norms import add_and_norm, add_before
from interlace.nn.routes import activation_op_serves, needs_grad
from interlace.nn.stepping import project_by, project_gated
from interlace.nn.swap import Fused, autocasting, collected, hooked, listened_to

if TYPE_CHECKING:
    from collections.abc import Callable

    from interlace.nn.block_graphs import BlockGraph
    from interlace.nn.projections import Merged


# up to here one product reads the weights faster than two; with more rows the halves of its result,
# which lie apart, cost the CPU what it gained
_FEW_ROWS = 16


@dataclass
class BlockState:
    """What a fused block knows.

    Attributes:
        first_norm: name of the norm before attention.
        attention: name of the attention layer.
        second_norm: name of the norm before the feed-forward part.
        mlp: name of that part.
        names: arguments of the stock block after the first.
        defaults: those of them that may be left out, and their values.
        graph: records and replays the block; None where it just runs.
        next_norm: the norm that reads the block's output; empty where it is not known. In a tuple,
            so that it does not become a part of the block.
    """

    first_norm: str
    attention: str
    second_norm: str
    mlp: str
    names: tuple[str, ...]
    defaults: dict[str, Any]
    graph: BlockGraph | None = None
    next_norm: tuple[nn.Module, ...] = ()


class FusedBlock(Fused):
    """A block of the form x + attention(norm(x)), then x + mlp(norm(x))."""

    interlace_state: BlockState

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on [..., hidden]; further arguments are the stock block's."""
        state = self.interlace_state
        given = {**dict(zip(state.names, args, strict=False)), **by_new_name(kwargs)}
        others = {**state.defaults, **given}
        if state.graph is not None:
            return state.graph(self, self._run, hidden_states, others)
        return self._run(hidden_states, **others)

    def _run(self, hidden_states: Tensor, **others: Any) -> Tensor:
        state = self.interlace_state
        second, mlp = getattr(self, state.second_norm), getattr(self, state.mlp)
        attention, following = getattr(self, state.attention), state.next_norm
        left_out = _left_out(mlp)
        if _left_out(attention):
            attention.hold_place(hidden_states, others)
            if left_out:
                # a recording must not give its input away
                return hidden_states.clone()
            normed, total = second(hidden_states), hidden_states
        else:
            normed = getattr(self, state.first_norm)(hidden_states)
            attended = attention(hidden_states=normed, **others)
            if isinstance(attended, tuple):
                attended = attended[0]
            if left_out:
                return add_before(attended, hidden_states, following[0] if following else None)
            normed, total = add_and_norm(attended, hidden_states, second)
        return add_before(mlp(normed), total, following[0] if following else None)


def _left_out(part: nn.Module) -> bool:
    """Tell whether a part adds nothing, and nobody asks what it gives."""
    return is_absent(part) and not listened_to([part]) and not collected() - {"hidden_states"}


def first_read(block: FusedBlock) -> nn.Module:
    """Return the norm that reads the input of a block."""
    state = block.interlace_state
    absent = is_absent(getattr(block, state.attention))
    norm: nn.Module = getattr(block, state.second_norm if absent else state.first_norm)
    return norm


def arguments(block: nn.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the arguments of a block's forward after the first, and the defaults they have."""
    parameters = list(inspect.signature(block.forward).parameters.values())[1:]
    named = [each for each in parameters if each.kind is not each.VAR_KEYWORD]
    defaults = {each.name: each.default for each in named if each.default is not each.empty}
    return tuple(each.name for each in named), defaults


@dataclass
class GatedState:
    """What a fused feed-forward part knows: its merged projections in."""

    merged: Merged


class FusedGatedMLP(Fused):
    """A feed-forward part down(activation(gate(x)) * up(x)), gate and up in one product."""

    interlace_state: GatedState
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Run the part on [..., hidden]."""
        merged = self.interlace_state.merged
        listened = isinstance(self.act_fn, nn.Module) and hooked(self.act_fn)
        if autocasting(x) or listened or not merged.serves((self.gate_proj, self.up_proj)):
            stock: Tensor = super().forward(x)
            return stock
        is_silu = isinstance(self.act_fn, nn.SiLU | SiLUActivation)
        both = project_gated(x, merged.weight, merged.bias) if is_silu else None
        if both is None:
            both = self._activated(x, is_silu=is_silu)
        return project_by(self.down_proj, both)

    def _activated(self, x: Tensor, *, is_silu: bool) -> Tensor:
        merged = self.interlace_state.merged
        # a compiler lays out what it fuses itself, and an export is to take rows of any number
        compiling = torch.compiler.is_compiling()
        if not compiling and x.device.type == "cpu" and x.numel() > _FEW_ROWS * x.shape[-1]:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = torch.split(merged(x), merged.sizes, dim=-1)
        if is_silu and activation_op_serves(gate):
            return ops.silu_mul(gate, up)
        if compiling or needs_grad(gate):
            out: Tensor = self.act_fn(gate) * up
            return out
        if is_silu:
            # in place: fresh memory of this size costs more than the activation
            return silu(gate, inplace=True).mul_(up)
        return self.act_fn(gate).mul_(up)
