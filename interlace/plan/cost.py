"""What a model costs to hold and to run, before and after a plan.

Legend, per tower: P parameters of a layer, T tokens, H query heads, K key and value heads,
d width of a head, S tokens of the other tower that cross-attention reads. P, H and K are those of
each layer where the layers differ.

    prefill, one layer      2 P T + 4 H d A      A = T (T + 1) / 2 causal, T T otherwise
    one decode step         2 P + 4 H d (T + 1)  with T tokens in the cache
    cross-attention adds    4 H d T S            and 4 H d S in a decode step
    KV cache, one layer     2 K d T              values, and 2 K d S for cross-attention

Two FLOPs per multiply-add. 2 P T counts every parameter of a layer once per token: exact for
matrices up to norms and biases (under 0.1 %), an upper bound for mixtures of experts. 4 H d counts
the two products of attention, queries with keys and weights with values, for one pair of tokens.
Embeddings and heads are left out: no plan changes them.

Source: the term 2 P per token is that of Kaplan et al., "Scaling Laws for Neural Language Models"
(arXiv 2001.08361), section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from interlace._records.plan_text import number, size
from interlace.errors import ConfigError, PlanError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from interlace.records import ModelShape, Plan, TowerShape


@dataclass(frozen=True)
class Cost:
    """What a model costs at given token counts.

    Attributes:
        parameters: of the whole model.
        weight_bytes: bytes of these.
        prefill_flops: FLOPs of the layers of all towers for one input.
        decode_flops: FLOPs of the layers of the causal towers for one further token.
        kv_cache_bytes: bytes of the KV cache after the input.
    """

    parameters: int
    weight_bytes: int
    prefill_flops: int
    decode_flops: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class CostChange:
    """Cost before and after a plan; `str()` gives a small table."""

    before: Cost
    after: Cost

    def ratio(self, name: str) -> float:
        """Return after / before of one cost by its field name; 1.0 where it was 0."""
        known = [each.name for each in fields(Cost)]
        if name not in known:
            raise ConfigError(unknown_name("cost", name, known))
        before = getattr(self.before, name)
        return float(getattr(self.after, name) / before) if before else 1.0

    def __str__(self) -> str:
        """Return one line per cost."""
        lines = []
        for each in fields(Cost):
            shown = size if each.name.endswith("bytes") else number
            before, after = (shown(getattr(cost, each.name)) for cost in (self.before, self.after))
            label = each.name.replace("_", " ").replace("flops", "FLOPs").replace("kv", "KV")
            lines.append(f"{label:<15} {before:>12} -> {after:>12}  {self.ratio(each.name):7.1%}")
        return "\n".join(lines)


def _count_of(counts: Mapping[str, int], name: str, what: str) -> int:
    count = counts.get(name, 0)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"{what}['{name}'] must be a whole number of at least 0, got {count!r}.")
    return count


def prefill_flops(shape: TowerShape, num_tokens: int, num_cross_tokens: int = 0) -> int:
    """Return the FLOPs of a tower's layers for an input of `num_tokens` tokens."""
    pairs = num_tokens * num_tokens
    if shape.causal:
        pairs = num_tokens * (num_tokens + 1) // 2
    attention = _attention_flops(shape, pairs, num_tokens * num_cross_tokens)
    return 2 * sum(shape.layer_parameters) * num_tokens + attention


def decode_flops(shape: TowerShape, num_tokens: int, num_cross_tokens: int = 0) -> int:
    """Return the FLOPs of a tower's layers for one token more; 0 for towers that do not decode."""
    if not shape.causal:
        return 0
    attention = _attention_flops(shape, num_tokens + 1, num_cross_tokens)
    return 2 * sum(shape.layer_parameters) + attention


def _attention_flops(shape: TowerShape, pairs: int, cross_pairs: int) -> int:
    """The two products of attention in all layers, for so many pairs of tokens in each."""
    heads, _ = shape.total_heads(cross=False)
    cross_heads, _ = shape.total_heads(cross=True)
    return 4 * shape.head_dim * (heads * pairs + cross_heads * cross_pairs)


def kv_cache_bytes(
    shape: TowerShape, num_tokens: int, num_cross_tokens: int = 0, bytes_per_value: int = 2
) -> int:
    """Return the bytes of a tower's KV cache; 0 for towers that do not decode."""
    if not shape.causal:
        return 0
    _, cross_heads = shape.total_heads(cross=True)
    cross = 2 * cross_heads * shape.head_dim * num_cross_tokens
    return (shape.kv_values_per_token * num_tokens + cross) * bytes_per_value


def model_cost(
    shape: ModelShape,
    num_tokens: Mapping[str, int],
    *,
    num_cross_tokens: Mapping[str, int] | None = None,
) -> Cost:
    """Return what a model costs for one input.

    Args:
        shape: sizes of the model.
        num_tokens: tower -> tokens that run through it; for "text" of a chat model those of the
            images included. A tower left out runs no tokens.
        num_cross_tokens: tower -> tokens that its cross-attention reads.

    Raises:
        ConfigError: a tower that the model does not have, or a count below 0.
    """
    cross = num_cross_tokens or {}
    for name in (*num_tokens, *cross):
        if name not in shape.towers:
            raise ConfigError(unknown_name("tower", name, shape.towers))
    prefill = decode = cache = 0
    for name, tower in shape.towers.items():
        tokens = _count_of(num_tokens, name, "num_tokens")
        read = _count_of(cross, name, "num_cross_tokens")
        if tokens == 0:
            continue
        prefill += prefill_flops(tower, tokens, read)
        decode += decode_flops(tower, tokens, read)
        cache += kv_cache_bytes(tower, tokens, read, shape.bytes_per_parameter)
    return Cost(
        parameters=shape.total_parameters,
        weight_bytes=shape.total_parameters * shape.bytes_per_parameter,
        prefill_flops=prefill,
        decode_flops=decode,
        kv_cache_bytes=cache,
    )


def plan_cost(
    plan: Plan,
    num_tokens: Mapping[str, int],
    *,
    num_cross_tokens: Mapping[str, int] | None = None,
) -> CostChange:
    """Return what a model costs for one input before and after a plan; see `model_cost`.

    Raises:
        PlanError: the plan does not know the model's sizes.
        ConfigError: a tower that the model does not have, or a count below 0.
    """
    if plan.shape is None:
        raise PlanError(
            "The plan does not know the sizes of the model. Plan with scores of a real model "
            "(score() records them), or give shape=... to Scores.from_similarity."
        )
    smaller = plan.shape.after(plan.towers)
    shapes = (plan.shape, smaller)
    before, after = (model_cost(s, num_tokens, num_cross_tokens=num_cross_tokens) for s in shapes)
    return CostChange(before, after)
