"""Drop-in fused modules for transformers models, and the attention implementation "interlace".

Importing this package registers the attention implementation, so that
`from_pretrained(..., attn_implementation="interlace")` works. `fuse` swaps the modules of a loaded
model for fused ones, `unfuse` swaps them back.
"""

from __future__ import annotations

from interlace.errors import BackendError

try:
    from interlace.nn.attention import head_groups, interlace_attention, register
    from interlace.nn.fusing import fuse, unfuse
    from interlace.nn.masks import interlace_mask
    from interlace.nn.report import FuseEntry, FuseReport
except ImportError as error:
    raise BackendError(
        f"interlace.nn needs transformers 5.17 or newer with its attention interface ({error}); "
        "pip install -U transformers."
    ) from error

__all__ = [
    "FuseEntry",
    "FuseReport",
    "fuse",
    "head_groups",
    "interlace_attention",
    "interlace_mask",
    "unfuse",
]

register()
