"""What is special to qk_norm_rope: what transformers computes, layouts, confinement, refusals."""

from __future__ import annotations

import importlib
import math
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace import ops
from interlace.errors import ShapeError
from interlace.ops import _rope
from interlace.ops._check import in_fp64, violations

if TYPE_CHECKING:
    from torch import Tensor

# the module, whose name the function hides
contract = importlib.import_module("interlace.ops.qk_norm_rope")

Q_HEADS, K_HEADS, TOKENS, BATCH = 4, 2, 11, 2


class Preamble:
    """What an attention layer of transformers does before it attends."""

    def __init__(self, family: str, config: Any, norm: str | None, rotary: str) -> None:
        self.module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        self.width = config.head_dim
        self.rotary = getattr(self.module, rotary)(config)
        self.norms = None
        if norm is not None:
            self.norms = [getattr(self.module, norm)(self.width, eps=1e-6) for _ in "qk"]
            for each in self.norms:
                torch.nn.init.normal_(each.weight, 1.0, 0.3)

    def weights(self) -> list[Tensor | None]:
        return [None, None] if self.norms is None else [norm.weight for norm in self.norms]

    def tables(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, positions)
        return cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]

    def __call__(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Heads-first queries and keys of [B, T, H, D], back in that order."""
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        cos, sin = self.rotary(q, positions)
        found = self.module.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return found[0].transpose(1, 2), found[1].transpose(1, 2)


def preamble(name: str) -> Preamble:
    import transformers

    sizes = {
        "hidden_size": 64,
        "num_attention_heads": Q_HEADS,
        "num_key_value_heads": K_HEADS,
        "head_dim": 32,
    }
    axes = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [6, 5, 5]}
    if name == "qwen3":
        return Preamble(
            "qwen3", transformers.Qwen3Config(**sizes), "Qwen3RMSNorm", "Qwen3RotaryEmbedding"
        )
    if name == "llama":
        return Preamble("llama", transformers.LlamaConfig(**sizes), None, "LlamaRotaryEmbedding")
    if name == "phi3":
        config = transformers.Phi3Config(
            **sizes, rope_parameters={**axes, "partial_rotary_factor": 0.5}, pad_token_id=0
        )
        config.head_dim = 32
        return Preamble("phi3", config, None, "Phi3RotaryEmbedding")
    if name == "qwen3_vl":
        config = transformers.Qwen3VLTextConfig(**sizes, rope_parameters=axes)
        return Preamble("qwen3_vl", config, "Qwen3VLTextRMSNorm", "Qwen3VLTextRotaryEmbedding")
    config = transformers.Qwen2VLTextConfig(**sizes, rope_parameters=axes)
    config.head_dim = 32
    return Preamble("qwen2_vl", config, None, "Qwen2VLRotaryEmbedding")


FAMILIES = ["qwen3", "llama", "phi3", "qwen3_vl", "qwen2_vl"]
INTERLEAVED = {"qwen3_vl": True, "qwen2_vl": False}


def heads(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, k = (torch.randn(BATCH, TOKENS, count, 32).to(dtype) for count in (Q_HEADS, K_HEADS))
    return q.requires_grad_(), k.requires_grad_()


def positions_for(name: str) -> Tensor:
    lead = (3,) if name in INTERLEAVED else ()
    return torch.randint(0, 3000, (*lead, BATCH, TOKENS))


def arguments(name: str, layer: Preamble, q: Tensor, k: Tensor, positions: Tensor) -> tuple:
    sections = [6, 5, 5] if name in INTERLEAVED else None
    tables = ops.rope_tables(positions, layer.rotary.inv_freq, layer.rotary.attention_scaling)
    return (q, k, *tables, *layer.weights(), 1e-6, sections, INTERLEAVED.get(name, True))


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_are_those_of_transformers_bit_for_bit(name: str) -> None:
    layer, positions = preamble(name), positions_for(name)
    mine = ops.rope_tables(
        positions,
        layer.rotary.inv_freq,
        layer.rotary.attention_scaling,
        sections=[6, 5, 5] if name in INTERLEAVED else None,
        interleaved=INTERLEAVED.get(name, True),
    )
    theirs = layer.tables(torch.zeros(1), positions)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_preamble_of_transformers_and_is_no_less_exact(
    name: str, dtype: torch.dtype
) -> None:
    layer, (q, k), positions = preamble(name), heads(dtype), positions_for(name)
    for norm in layer.norms or ():
        norm.to(dtype)
    args = arguments(name, layer, q, k, positions)
    leaves = [arg for arg in (q, k, *layer.weights()) if arg is not None]

    theirs = list(layer(q, k, positions))
    mine = list(contract.OP(*args))
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    fresh = iter(exact_leaves)
    exact_args = [
        next(fresh) if any(arg is leaf for leaf in leaves) else in_fp64(arg) for arg in args
    ]
    truth = list(contract.reference(*exact_args))
    seeds = [torch.randn(out.shape).to(dtype) for out in mine]
    theirs += torch.autograd.grad(theirs, leaves, seeds)
    mine += torch.autograd.grad(mine, leaves, seeds)
    truth += torch.autograd.grad(truth, exact_leaves, [seed.double() for seed in seeds])

    budget = contract.OP.budget
    for place, (one, other, exact) in enumerate(zip(mine, theirs, truth, strict=True)):
        assert budget.excess(one, other, exact) is None, place
        if dtype == torch.float32:
            # theirs is the same function, not only a worse one
            assert budget.excess(other, one, exact) is None, place


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("sections", [[6, 5, 5], [4, 6, 6], [16, 0, 0], [2, 12, 2]])
def test_merged_tables_give_the_same_bits(sections: list[int], interleaved: bool) -> None:
    q, k = torch.randn(TOKENS, 3, 32), torch.randn(TOKENS, 1, 32)
    positions, inv_freq = torch.randint(0, 500, (3, TOKENS)), 0.5 ** torch.arange(16)
    layout = {"sections": sections, "interleaved": interleaved}
    late = ops.qk_norm_rope(q, k, *ops.rope_tables(positions, inv_freq), **layout)
    early = ops.qk_norm_rope(q, k, *ops.rope_tables(positions, inv_freq, **layout))
    assert torch.equal(late[0], early[0])
    assert torch.equal(late[1], early[1])


def test_axes_of_both_layouts() -> None:
    cpu = torch.device("cpu")
    assert _rope.axes(8, [4, 2, 2], True, cpu).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert _rope.axes(8, [4, 2, 2], False, cpu).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert _rope.axes(6, [2, 0, 4], True, cpu).tolist() == [0, 0, 2, 0, 0, 2]


def plain(tokens: int = TOKENS, width: int = 16) -> dict[str, Any]:
    cos, sin = ops.rope_tables(torch.arange(tokens), 0.6 ** torch.arange(8))
    return {
        "q": torch.randn(tokens, 3, width),
        "k": torch.randn(tokens, 2, width),
        "cos": cos,
        "sin": sin,
        "q_weight": torch.randn(width),
        "k_weight": torch.randn(width),
    }


def in_fp64_all(args: dict[str, Any], shift: int = 0) -> dict[str, Any]:
    """The same arguments in fp64, with tables as exact as that, of positions further on."""
    angles = (torch.arange(TOKENS, dtype=torch.float64) + shift)[:, None] * 0.6 ** torch.arange(8)
    exact = {name: in_fp64(value) for name, value in args.items()}
    return exact | {"cos": angles.cos(), "sin": angles.sin()}


def test_scores_depend_on_distances_alone() -> None:
    args = plain()
    scores = []
    for shift in (0, 700):
        q, k = ops.qk_norm_rope(**in_fp64_all(args, shift))
        scores.append(torch.einsum("ihd,jhd->hij", q[:, :2], k))
    torch.testing.assert_close(*scores)


def test_rotation_alone_keeps_lengths_and_is_undone_by_its_gradient() -> None:
    args = in_fp64_all(plain()) | {"q_weight": None, "k_weight": None}
    args["q"].requires_grad_()
    q, _ = ops.qk_norm_rope(**args)
    torch.testing.assert_close(q.norm(dim=-1), args["q"].norm(dim=-1))
    (back,) = torch.autograd.grad(q, args["q"], q.detach())
    torch.testing.assert_close(back, args["q"].detach())


def test_layouts_and_batches_give_the_same_bits() -> None:
    args = plain()
    expected = ops.qk_norm_rope(**args)
    merged = torch.cat((args["q"], args["k"], torch.randn(TOKENS, 2, 16)), dim=1)
    slices = {"q": merged[:, :3], "k": merged[:, 3:5]}
    first = {
        name: args[name].transpose(0, 1).contiguous()[None].transpose(1, 2) for name in ("q", "k")
    }
    for change in (slices, first):
        found = ops.qk_norm_rope(**(args | change))
        for one, other in zip(found, expected, strict=True):
            assert one.is_contiguous()
            assert torch.equal(one.view(other.shape), other)


def test_tokens_are_independent() -> None:
    args = plain()
    whole = ops.qk_norm_rope(**args)
    for token in (0, 4, TOKENS - 1):
        row = {name: args[name][token : token + 1] for name in ("q", "k", "cos", "sin")}
        for one, all_of_them in zip(ops.qk_norm_rope(**(args | row)), whole, strict=True):
            assert torch.equal(one[0], all_of_them[token])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_values_stay_within_their_head(value: float) -> None:
    args = plain(width=20)
    args["q"][3, 1, 18] = value
    args["q"].requires_grad_()
    q, k = ops.qk_norm_rope(**args)
    touched = torch.zeros(TOKENS, 3, dtype=torch.bool)
    touched[3, 1] = True
    assert torch.equal(q.isnan().any(-1), touched)
    assert bool(k.isfinite().all())
    (dq,) = torch.autograd.grad(q, args["q"], torch.ones_like(q))
    assert torch.equal(dq.isnan().any(-1), touched)


# torch.compile itself makes an instance of the class while it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break() -> None:
    args = plain()
    positions, inv_freq = torch.randint(0, 500, (3, TOKENS)), 0.5 ** torch.arange(8)

    def heads_of(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        cos, sin = ops.rope_tables(positions, inv_freq)
        q, k = ops.qk_norm_rope(q, k, cos, sin, q_weight=args["q_weight"], sections=[4, 2, 2])
        return torch.cat((q, k), dim=1)

    compiled = torch.compile(heads_of, fullgraph=True, backend="aot_eager")
    given = (args["q"], args["k"], positions)
    assert torch.equal(compiled(*given), heads_of(*given))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(4, 16)}, r"\[T, H, D\] or \[B, T, H, D\]"),
        ({"q": torch.zeros(4, 3, 16, dtype=torch.int64)}, "floating-point"),
        ({"k": torch.zeros(5, 2, 16)}, "number of heads only"),
        ({"k": torch.zeros(4, 2, 16).half()}, "number of heads only"),
        ({"k": torch.zeros(4, 2, 18)}, "number of heads only"),
        ({"cos": torch.zeros(5, 8)}, r"cos is .* expected floating-point \[4, F\]"),
        ({"cos": torch.zeros(3, 4, 8)}, r"expected floating-point \[4, F\]"),
        ({"sin": torch.zeros(4, 7)}, "expected two alike"),
        ({"cos": torch.zeros(4, 16), "sin": torch.zeros(4, 16)}, "cut in half"),
        ({"cos": torch.zeros(4, 0), "sin": torch.zeros(4, 0)}, r"expected 1\.\.8"),
        ({"sections": [3, 3, 2]}, "three axes in front because of the sections"),
        ({"q_weight": torch.zeros(8)}, r"q_weight is .* expected floating-point \(16,\)"),
        ({"k_weight": torch.zeros(16, dtype=torch.int32)}, "k_weight is"),
        ({"cos": torch.zeros(4, 8, requires_grad=True)}, "cos requires a gradient"),
        ({"eps": -1e-6}, "expected 0 or more"),
        ({"eps": math.nan}, "expected 0 or more"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        ops.qk_norm_rope(**(plain(tokens=4) | change))


@pytest.mark.parametrize("sections", [[3, 3, 3], [8], [10, -1, -1]])
def test_sections_have_to_fit(sections: list[int]) -> None:
    tables = {name: torch.zeros(3, TOKENS, 8) for name in ("cos", "sin")}
    with pytest.raises(ShapeError, match="add up to the 8 frequencies"):
        ops.qk_norm_rope(**(plain() | tables), sections=sections)
    with pytest.raises(ShapeError, match="add up to the 8 frequencies"):
        ops.rope_tables(torch.zeros(3, 4), torch.ones(8), sections=sections)


def test_tables_refuse_positions_without_axes() -> None:
    with pytest.raises(ShapeError, match=r"expected \[3, \.\.\., T\]"):
        ops.rope_tables(torch.zeros(5), torch.ones(8), sections=[4, 2, 2])
    with pytest.raises(ShapeError, match=r"expected \[F\]"):
        ops.rope_tables(torch.zeros(5), torch.ones(1, 8))


def test_fp64_is_refused_by_triton_and_served_by_torch() -> None:
    args = [each.double() for each in plain().values()]
    reason = contract._triton_why_not(*args, 1e-6, None, True)
    assert reason is not None
    assert "float64" in reason
    assert contract.OP(*args, 1e-6, None, True)[0].dtype == torch.float64


@given(
    tokens=st.integers(1, 9),
    q_heads=st.integers(1, 20),
    k_heads=st.integers(0, 9),
    width=st.sampled_from([6, 34, 64, 80, 96, 128]),
    share=st.sampled_from([1.0, 0.5, 0.3]),
    norms=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 999),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_interpreted_kernels_keep_the_budget_on_any_heads(
    tokens: int,
    q_heads: int,
    k_heads: int,
    width: int,
    share: float,
    norms: tuple[bool, bool],
    seed: int,
) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is present; the gpu lane runs the kernels")
    torch.manual_seed(seed)
    half = max(1, int(width * share) // 2)
    q, k = torch.randn(tokens, q_heads, width), torch.randn(tokens, k_heads, width)
    tables = ops.rope_tables(torch.randint(0, 999, (tokens,)), 0.7 ** torch.arange(half))
    weights = [torch.randn(width) if norm else None for norm in norms]
    args = (q, k, *tables, *weights, 1e-6, None, True)
    for op, given_args in (
        (contract.OP, args),
        (contract.BACKWARD, (torch.randn_like(q), torch.randn_like(k), *args)),
    ):
        truth, own = op.reference(*in_fp64(given_args)), op.reference(*given_args)
        for each in zip(op.run("triton", *given_args), own, truth, strict=True):
            assert op.budget.excess(*each) is None


@given(num_heads=st.integers(0, 200), rows=st.sampled_from([1, 2, 8, 16, 32, 64]))
def test_tiles_cover_all_heads_with_little_padding(num_heads: int, rows: int) -> None:
    kernels = pytest.importorskip("interlace.triton_kernels.qk_norm_rope")
    tokens, heads_of_tile, tiles = kernels._tile_of(num_heads, rows)
    assert tokens * heads_of_tile == rows
    assert 0 <= heads_of_tile * tiles - num_heads < max(8, heads_of_tile)


def test_contract_holds_for_a_transposed_gradient() -> None:
    args = plain()
    gradients = (
        torch.randn(3, TOKENS, 16).transpose(0, 1),
        torch.randn(TOKENS, 2, 1).expand(-1, -1, 16),
    )
    assert violations(contract.BACKWARD, (*gradients, *args.values(), 1e-6, None, True)) == []
