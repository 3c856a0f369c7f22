"""Ops: small, heavily used computations with one meaning and several implementations.

Adding an op `X`:

1. Write `interlace/ops/X.py`: the public function, `reference` (plain PyTorch, the meaning),
   `_fake`, `_samples`, and `OP = Op("X", reference, ...)`. An op that is trained through has a
   second contract `X_bwd` in the same file, joined by `backward=Backward(...)`. Import the public
   function here. The op now works, is tested and documented.
2. Add kernels under the same stem: `csrc/cpu/X.cpp` (and its line in `csrc/bindings.cpp`) or
   `triton_kernels/X.py`. Name them in `backends=(...)`, each with a `why_not`.
3. `make test`: `tests/ops/test_contract.py` finds the op and holds every backend to the reference.
"""

from __future__ import annotations

from interlace.ops._diagnosis import Row, doctor, explain, table
from interlace.ops._rope import rope_tables
from interlace.ops._selection import backend
from interlace.ops.bridge_norm import bridge_norm
from interlace.ops.layer_similarity import layer_similarity
from interlace.ops.qk_norm_rope import qk_norm_rope
from interlace.ops.ragged_attention import q_start_of, ragged_attention
from interlace.ops.ragged_decode import ragged_decode
from interlace.ops.silu_mul import silu_mul
from interlace.ops.skinny_linear import skinny_linear

__all__ = [
    "Row",
    "backend",
    "bridge_norm",
    "doctor",
    "explain",
    "layer_similarity",
    "q_start_of",
    "qk_norm_rope",
    "ragged_attention",
    "ragged_decode",
    "rope_tables",
    "silu_mul",
    "skinny_linear",
    "table",
]
