"""Fused attention layers: one projection, one norm and rotation, attention on our ops.

Letters: B batch, T tokens, S tokens of all images, Hq query heads, Hkv key-value heads, H heads, D
head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from interlace import ops
from interlace.nn.attention import NAME, interlace_attention
from interlace.nn.cache_memory import CACHE, by_new_name
from interlace.nn.heads import norm_and_rotate
from interlace.nn.routes import packed_op_serves
from interlace.nn.stepping import cached, project_by
from interlace.nn.swap import Fused, autocasting, hooked

if TYPE_CHECKING:
    from interlace.nn.projections import Merged

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass
class AttentionState:
    """What a fused attention layer knows.

    Attributes:
        merged: its projections; None where they stay apart.
        rope: rotate queries and keys by the op.
        out: name of the output projection.
        scale: name of the factor of the scores.
        dropout: name of the dropout of the weights.
    """

    merged: Merged | None
    rope: bool
    out: str = "o_proj"
    scale: str = "scaling"
    dropout: str = "attention_dropout"


class _Attention(Fused):
    """What the fused attention layers share."""

    interlace_state: AttentionState
    config: Any
    head_dim: int

    def _leaves(self, x: Tensor) -> bool:
        """Tell whether the call is the stock module's: another attention, autocast, hooks."""
        norms = [each for each in self._head_norms() if each is not None]
        return (
            self.config._attn_implementation != NAME
            or autocasting(x)
            or hooked(*norms)
            or any(each.weight.dtype != x.dtype for each in norms)
        )

    def _head_norms(self) -> tuple[Any, Any]:
        return getattr(self, "q_norm", None), getattr(self, "k_norm", None)

    def _dropout(self) -> float:
        return float(getattr(self, self.interlace_state.dropout)) if self.training else 0.0

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values [B, T, heads, D], and the first two in one where they are."""
        projections = [getattr(self, name) for name in QKV]
        merged, shape = self.interlace_state.merged, (*x.shape[:-1], -1, self.head_dim)
        if merged is None or not merged.serves(projections):
            q, k, v = (each(x).view(shape) for each in projections)
            return q, k, v, None
        heads = merged(x).view(shape)
        num_q, num_k, _ = (size // self.head_dim for size in merged.sizes)
        joint, v = heads[..., : num_q + num_k, :], heads[..., num_q + num_k :, :]
        return joint[..., :num_q, :], joint[..., num_q:, :], v, joint


class FusedAttention(_Attention):
    """Self-attention with projections q_proj, k_proj and v_proj: text decoders, CLIP, SigLIP."""

    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Attend: [B, T, hidden] -> the same and, if asked for, the weights."""
        others = by_new_name(others)
        state, cache = self.interlace_state, others.get(CACHE)
        # that of continuous batching, which is updated in ways of its own
        paged = cache is not None and not isinstance(cache, Cache)
        if paged or self._leaves(hidden_states):
            if position_embeddings is not None:
                others["position_embeddings"] = position_embeddings
            return super().forward(hidden_states, attention_mask=attention_mask, **others)
        others.pop(CACHE, None)
        query, key, value, joint = self._project(hidden_states)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query, key = norm_and_rotate(
                query, key, cos, sin, *self._head_norms(), joint=joint, by_op=state.rope
            )
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if cache is not None:
            key, value = cached(cache, key, value, self.layer_idx)
        out, weights = interlace_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=getattr(self, state.scale),
            dropout=self._dropout(),
            **others,
        )
        out = out.reshape(*hidden_states.shape[:-1], -1)
        return project_by(getattr(self, state.out), out), weights


class FusedVisionAttention(_Attention):
    """Attention of Qwen's vision towers: images of any size one after the other."""

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **others: Any,
    ) -> Tensor:
        """Attend within every image: [S, hidden] -> the same."""
        stock = self._leaves(hidden_states) or others.get("output_attentions")
        if stock or position_embeddings is None:
            done: Tensor = super().forward(
                hidden_states,
                cu_seqlens=cu_seqlens,
                position_embeddings=position_embeddings,
                max_seqlen=max_seqlen,
                **others,
            )
            return done
        num_tokens = hidden_states.shape[0]
        heads = self.qkv(hidden_states).view(num_tokens, 3 * self.num_heads, -1)
        joint, value = heads[:, : 2 * self.num_heads], heads[:, 2 * self.num_heads :]
        query, key = norm_and_rotate(
            joint[:, : self.num_heads],
            joint[:, self.num_heads :],
            *position_embeddings,
            joint=joint,
            by_op=self.interlace_state.rope,
        )
        out = self._attend(query, key, value, cu_seqlens, max_seqlen)
        projected: Tensor = self.proj(out.reshape(num_tokens, -1))
        return projected

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, most: int | None
    ) -> Tensor:
        q, k, v = (each.transpose(0, 1)[None] for each in (query, key, value))
        if self._dropout() == 0.0 and packed_op_serves(q, k, v):
            if most is None:
                compiling = torch.compiler.is_compiling()
                most = query.shape[0] if compiling else longest(cu_seqlens)
            out, _ = ops.ragged_attention(
                query,
                key,
                value,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=most,
                max_seqlen_kv=most,
                q_start=range(self.num_heads + 1),
                causal=False,
                scale=self.scaling,
            )
            return out
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        pieces = zip(*(torch.split(each, lengths, dim=2) for each in (q, k, v)), strict=True)
        options: dict[str, Any] = {"scaling": self.scaling, "dropout": self._dropout()}
        attended = [
            interlace_attention(self, q, k, v, None, is_causal=False, **options)[0]
            for q, k, v in pieces
        ]
        return torch.cat(attended, dim=1)


def longest(cu_seqlens: Tensor) -> int:
    """Length of the longest image; waits for the device once per forward pass."""
    kept: int | None = getattr(cu_seqlens, "interlace_longest", None)
    if kept is None:
        kept = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        # all layers get the same tensor
        cu_seqlens.interlace_longest = kept  # type: ignore[attr-defined]
    return kept


class FusedBlipAttention(_Attention):
    """Attention of BLIP's vision tower, which stock transformers computes step by step."""

    qkv: nn.Linear
    projection: nn.Linear
    dropout: nn.Dropout
    num_heads: int
    scale: float

    def forward(self, hidden_states: Tensor, **others: Any) -> Any:
        """Attend: [B, T, hidden] -> the same and, if asked for, the weights."""
        if self._leaves(hidden_states) or hooked(self.dropout):
            return super().forward(hidden_states, **others)
        batch, num_tokens, _ = hidden_states.shape
        heads = self.qkv(hidden_states).view(batch, num_tokens, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        out, weights = interlace_attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scale,
            dropout=self._dropout(),
            is_causal=False,
            output_attentions=others.get("output_attentions") or self.config.output_attentions,
        )
        return self.projection(out.reshape(batch, num_tokens, -1)), weights

    def _dropout(self) -> float:
        return float(self.dropout.p) if self.training else 0.0


@dataclass
class CallerState:
    """What a layer knows that calls our attention by itself: whether weights are asked of it."""

    weights: bool = False


class FusedCaller(Fused):
    """A layer that calls our attention by itself, but may keep the request for weights back."""

    interlace_state: CallerState

    def forward(self, *args: Any, **others: Any) -> Any:
        """Run the stock layer."""
        self.interlace_state.weights = bool(others.get("output_attentions"))
        return super().forward(*args, **others)
