"""Drop-in fused modules for transformers models, and the attention implementation "interlace".

Importing this package registers the attention implementation, so that
`from_pretrained(..., attn_implementation="interlace")` works. `fuse` swaps the modules of a loaded
model for fused ones, `unfuse` swaps them back.
"""

from __future__ import annotations

from interlace.nn.attention import interlace_attention, register
from interlace.nn.masks import interlace_mask

__all__ = ["interlace_attention", "interlace_mask"]

register()
